"""The spool: nothing lost, no secret on the disk, one owner."""

from __future__ import annotations

import gzip
import json
import os
import resource
import secrets
import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from metaclaw_core.model import Exchange, Hints, Injection
from metaclaw_core.store.spool import (
    SpoolError,
    SpoolReader,
    SpoolWriter,
    exchange_of,
    head_of,
    redacted,
    remove_if_done,
    row_of,
)

KEY = b"sk-ant-api03-aaaabbbbccccdddd"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "1-2.db"


def test_what_was_appended_is_read_back(path: Path, chat: Any) -> None:
    first = chat("hi", injection=Injection("block", ("a", "b"), 7, (2.5, None)), hints=Hints("a" * 32, "s-1", "openclaw"))
    second = replace(chat("again"), status_code=None, duration_ms=None, complete=False, error="gone", response_body=b"")
    with SpoolWriter(path) as writer:
        writer.append([first, second])
    with SpoolReader(path) as reader:
        assert reader.batch(10) == [(1, first), (2, second)]
        reader.delete([1])
        assert reader.batch(10) == [(2, second)]
        assert reader.counts() == (1, 0)


def test_an_injection_of_a_version_that_kept_no_scores_is_read(chat: Any) -> None:
    head, *bodies = row_of(chat("hi", injection=Injection("block", ("a",), 7, (2.5,))))
    old = json.loads(head)
    del old["injection"]["scores"]
    assert exchange_of(json.dumps(old), *bodies).injection == Injection("block", ("a",), 7)


def test_a_row_id_is_never_given_twice(path: Path, chat: Any) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.append([chat("one")])
        reader.delete([1])
        writer.append([chat("two")])
        assert [row_id for row_id, _ in reader.batch(10)] == [2]


def test_the_file_is_private(path: Path, chat: Any) -> None:
    with SpoolWriter(path) as writer:
        writer.append([chat("hi")])
        modes = {p.name.removeprefix(path.name): stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    assert modes == {"": 0o600, "-wal": 0o600, "-shm": 0o600, ".lock": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_batch_is_bounded_in_rows_and_bytes(path: Path, chat: Any) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.append([chat("x" * 1000, answer=b"") for _ in range(6)])
        assert [row_id for row_id, _ in reader.batch(4)] == [1, 2, 3, 4]
        assert [row_id for row_id, _ in reader.batch(9, max_bytes=2000)] == [1, 2]
        assert [row_id for row_id, _ in reader.batch(9, max_bytes=1)] == [1]


def test_an_append_survives_kill_9(path: Path, chat: Any) -> None:
    exchange = chat("hi")
    code = (
        "import os, signal, sys; from pathlib import Path; from metaclaw_core.store.spool import SpoolWriter, exchange_of\n"
        "e = exchange_of(sys.argv[2], b'request', b'response')\n"
        "SpoolWriter(Path(sys.argv[1])).append([e]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), head_of(exchange)], check=False)
    assert done.returncode == -signal.SIGKILL
    SpoolWriter(path).close()  # nobody holds it any more
    with SpoolReader(path) as reader:
        assert reader.batch(10) == [(1, replace(exchange, request_body=b"request", response_body=b"response"))]


def test_the_module_imports_no_database_library() -> None:
    code = "import sys, metaclaw_core.store.spool; print(*{'sqlalchemy', 'brotli', 'mitmproxy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# --- secrets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("", bytes), ("gzip", gzip.compress), ("br", brotli.compress), ("zstd", zstandard.compress)],
)
def test_a_secret_in_a_body_never_reaches_the_file(path: Path, chat: Any, encoding: str, encode: Any) -> None:
    body = b'{"messages":[{"role":"user","content":"my key is ' + KEY + b'"}]}'
    exchange = replace(
        chat(),
        request_body=encode(body),
        request_encoding=encoding,
        response_body=encode(b"data: " + KEY + b"\n\n"),
        response_encoding=encoding,
        path="/v1/chat/completions?key=AIzaSyAaaaaaaaaaaa&alt=sse",
    )
    with SpoolWriter(path) as writer:
        writer.append([exchange])
        raw = b"".join(p.read_bytes() for p in path.parent.iterdir())
    assert KEY not in raw
    assert b"AIzaSy" not in raw
    with SpoolReader(path) as reader:
        [(_, stored)] = reader.batch(1)
    assert stored.request_body == b'{"messages":[{"role":"user","content":"my key is [redacted:anthropic-key]"}]}'
    assert stored.response_body == b"data: [redacted:anthropic-key]\n\n"
    assert (stored.request_encoding, stored.response_encoding) == ("", "")
    assert stored.path == "/v1/chat/completions?key=[redacted]&alt=sse"


def test_a_compressed_body_without_secrets_keeps_its_bytes(chat: Any) -> None:
    exchange = replace(chat(), response_body=gzip.compress(b"data: hello\n\n"), response_encoding="gzip")
    assert redacted(exchange) == exchange


def test_a_cut_compressed_body_is_kept_as_what_decoded(chat: Any) -> None:
    """The undecoded rest can't be searched, so it isn't stored."""
    sent = gzip.compress(os.urandom(3000))
    stored = redacted(replace(chat(), response_body=sent[:2000], response_encoding="gzip"))
    assert stored.response_encoding == ""
    assert 0 < len(stored.response_body) < 2000


def test_a_body_that_cannot_be_searched_is_not_stored(chat: Any) -> None:
    stored = redacted(replace(chat("hi"), response_body=b"\x00\x01", response_encoding="compress, gzip"))
    assert (stored.request_body, stored.response_body) == (b"", b"")
    assert stored.error == "bodies not stored: content-encoding 'compress' is not known"


def test_an_unexpected_failure_stores_no_body_and_quotes_nothing(chat: Any) -> None:
    broken = replace(chat("hi"), response_body=None, path="//[" + KEY.decode())
    stored = redacted(broken)
    assert (stored.request_body, stored.response_body) == (b"", b"")
    assert KEY.decode() not in (stored.error or "")


def test_the_proxys_error_text_is_redacted(chat: Any) -> None:
    stored = redacted(replace(chat("hi"), error="upstream said: bad key " + KEY.decode()))
    assert stored.error == "upstream said: bad key [redacted:anthropic-key]"


# --- damage and ownership -----------------------------------------------------------------------


def test_an_unreadable_row_is_set_aside_and_its_neighbours_come(path: Path, chat: Any) -> None:
    with SpoolWriter(path) as writer:
        writer.append([chat("one"), chat("two"), chat("three")])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE exchanges SET head = '{' WHERE id = 1")
        db.execute("""UPDATE exchanges SET head = '{"of": "the future"}' WHERE id = 2""")
    db.close()
    with SpoolReader(path) as reader:
        assert [row_id for row_id, _ in reader.batch(10)] == [3]
        reader.delete([3])
        assert reader.batch(10) == []
        assert reader.counts() == (0, 2)
    assert not remove_if_done(path)


def test_a_batch_of_unreadable_rows_does_not_hide_those_behind_it(path: Path, chat: Any) -> None:
    with SpoolWriter(path) as writer:
        writer.append([chat("one"), chat("two"), chat("three")])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE exchanges SET head = '{' WHERE id < 3")
    db.close()
    with SpoolReader(path) as reader:
        assert [row_id for row_id, _ in reader.batch(2)] == [3]


def test_a_spool_has_one_writer(path: Path) -> None:
    with SpoolWriter(path) as writer:
        assert writer.meta()["pid"] == str(os.getpid())
        with pytest.raises(SpoolError, match="is in use by another process"):
            SpoolWriter(path)
    SpoolWriter(path).close()


def test_a_spool_is_removed_only_when_empty_and_without_an_owner(path: Path, chat: Any) -> None:
    writer = SpoolWriter(path)
    writer.append([chat("hi")])
    with SpoolReader(path) as reader:
        assert not remove_if_done(path)
        reader.delete([1])
    assert not remove_if_done(path)
    writer.close()
    assert remove_if_done(path)
    assert list(path.parent.iterdir()) == []


def test_a_removed_spool_can_be_made_again(path: Path, chat: Any) -> None:
    SpoolWriter(path).close()
    assert remove_if_done(path)
    with SpoolWriter(path) as writer:
        writer.append([chat("hi")])
        with pytest.raises(SpoolError, match="is in use by another process"):
            SpoolWriter(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write read-only files")
def test_a_read_only_folder_is_a_typed_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SpoolError, match="can't be opened"):
        SpoolWriter(tmp_path / "new" / "spool.db")


def test_a_full_disk_is_a_typed_error_and_the_writer_goes_on(path: Path, chat: Any) -> None:
    with SpoolWriter(path) as writer:
        writer.append([chat("one")])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(SpoolError, match="can't be written"):
                writer.append([chat("small"), chat(secrets.token_hex(400_000))])  # the spool compresses
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.append([chat("two")])
    with SpoolReader(path) as reader:
        assert reader.counts() == (2, 0)


def test_a_file_that_is_no_database_is_a_typed_error(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(SpoolError, match="file is not a database"):
        SpoolReader(path)
    with pytest.raises(SpoolError, match="file is not a database"):
        SpoolWriter(path)
    path.unlink()
    SpoolWriter(path).close()  # the one that failed holds nothing


def test_a_missing_spool_is_a_typed_error(path: Path) -> None:
    with pytest.raises(SpoolError, match="can't be opened"):
        SpoolReader(path)


def test_a_newer_format_is_refused(path: Path) -> None:
    SpoolWriter(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '3' WHERE key = 'format'")
    db.close()
    with pytest.raises(SpoolError, match=r"written by a newer MetaClaw \(format 3\)"):
        SpoolReader(path)


@example("\ud800 \x00", 0.1, True)
@given(text=st.text(max_size=30), number=st.floats(allow_nan=False, allow_infinity=False), flag=st.booleans())
def test_any_field_survives_the_head(text: str, number: float, flag: bool) -> None:
    exchange = Exchange(
        text,
        text,
        text,
        text,
        text,
        1,
        text,
        number,
        number,
        text,
        Hints(text),
        b"",
        "",
        5,
        b"",
        "",
        text,
        flag,
        text,
        flag,
    )
    assert exchange_of(head_of(exchange), b"", b"") == exchange
    assert json.loads(head_of(exchange))["flow_id"] == text
    assert head_of(exchange).isascii()
