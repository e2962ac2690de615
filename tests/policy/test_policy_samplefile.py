"""The policy server's own file: samples that survive, remembered tokens, conversations by response id, forgetting."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from metaclaw_core.errors import StoreError
from metaclaw_core.model import Message, Role, Text
from metaclaw_core.store import samplefile
from metaclaw_core.store.db import open_store
from metaclaw_core.store.purge import Found, Selection, purge_policy_file
from metaclaw_core.store.samplefile import Reply, Response, Sample, SampleFile
from metaclaw_core.store.tables import samples

SAMPLE = Sample(
    flow_id="flow-1",
    created_at=1_790_000_000.5,
    base_model="tiny",
    tokenizer="f00d",
    version=3,
    checkpoint="tinker://run/sampler_weights/step3",
    klass="A",
    klass_reason=None,
    sampling={"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 64, "seed": None, "stop": None},
    prompt_ids=(1, 2, 70_000),
    tokens=(7, 8),
    logprobs=(-0.5, -1.25),
    reused=2,
    segments=1,
    stop_reason="stop",
    malformed=False,
    redacted=False,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / samplefile.FILE


@pytest.fixture
def file(path: Path) -> Iterator[SampleFile]:
    with SampleFile(path) as opened:
        yield opened


def said(role: Role, text: str) -> Message:
    return Message(role, (Text(text),))


def test_a_sample_comes_out_as_a_row_of_the_table_samples(file: SampleFile, path: Path, tmp_path: Path) -> None:
    file.keep("s", SAMPLE)
    [(row_id, values)] = samplefile.pending(path)
    with open_store(tmp_path / "store.db") as store:
        with store.transaction() as connection:
            connection.execute(insert(samples).values(**values))
        with store.reading() as connection:
            row = connection.execute(select(samples)).one()
    assert (row.flow_id, row.version, row.klass, row.length, row.prompt_length) == ("flow-1", 3, "A", 2, 3)
    assert samplefile.unpack_ids(row.prompt_ids).tolist() == [1, 2, 70_000]
    assert samplefile.unpack_ids(row.tokens).tolist() == [7, 8]
    assert samplefile.unpack_logprobs(row.logprobs).tolist() == [-0.5, -1.25]
    samplefile.remove(path, [row_id])
    assert samplefile.pending(path) == []


def test_the_file_is_its_owners_alone(file: SampleFile, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_flow_keeps_its_first_sample(file: SampleFile, path: Path) -> None:
    file.keep("s", SAMPLE)
    file.keep("s", replace(SAMPLE, tokens=(9,), logprobs=(-1.0,)))
    [(_, values)] = samplefile.pending(path)
    assert values["length"] == 2


def test_a_sample_that_held_a_secret_has_no_ids(file: SampleFile, path: Path) -> None:
    file.keep("s", replace(SAMPLE, redacted=True))
    [(_, values)] = samplefile.pending(path)
    assert (values["prompt_ids"], values["tokens"], values["logprobs"]) == (None, None, None)
    assert (values["redacted"], values["length"], values["prompt_length"]) == (True, 2, 3)


def test_without_a_file_nothing_waits(tmp_path: Path) -> None:
    assert samplefile.pending(tmp_path / "none.db") == []


def test_the_tokens_of_a_reply_are_known_after_a_restart(file: SampleFile, path: Path) -> None:
    file.keep("s", None, Reply("key", (5, 6, 2)))
    with SampleFile(path) as again:
        assert again.replies("s") == {"key": (5, 6, 2)}
        assert again.replies("another session") == {}


def test_a_conversation_is_put_together_from_response_ids(file: SampleFile) -> None:
    first = Response("resp_1", "p", None, (said(Role.SYSTEM, "Be brief."), said(Role.USER, "Hi"), said(Role.ASSISTANT, "Hello")))
    second = Response("resp_2", "p", "resp_1", (said(Role.USER, "Bye"), said(Role.ASSISTANT, "See you")))
    file.keep("s", None, None, first)
    file.keep("s", None, None, second)
    found = file.conversation("p", "resp_2")
    assert found is not None
    assert [m.text for m in found] == ["Be brief.", "Hi", "Hello", "Bye", "See you"]
    assert file.conversation("somebody else", "resp_2") is None
    assert file.conversation("p", "resp_9") is None


def test_new_instructions_replace_the_old_ones(file: SampleFile) -> None:
    before = (said(Role.SYSTEM, "Be brief."), said(Role.USER, "Hi"), said(Role.ASSISTANT, "Hello"))
    sent = (said(Role.SYSTEM, "Be long."), said(Role.USER, "Bye"))
    assert [m.text for m in samplefile.continued(before, sent)] == ["Be long.", "Hi", "Hello", "Bye"]


def test_a_conversation_with_a_gap_is_not_known(file: SampleFile) -> None:
    file.keep("s", None, None, Response("resp_2", "p", "resp_1", (said(Role.USER, "Bye"),)))
    assert file.conversation("p", "resp_2") is None


def test_a_secret_in_a_conversation_does_not_reach_the_disk(file: SampleFile, path: Path) -> None:
    secret = "sk-ant-abcdefghijklmnop"
    file.keep("s", None, None, Response("resp_1", "p", None, (said(Role.USER, f"The key is {secret}"),)))
    found = file.conversation("p", "resp_1")
    assert found is not None
    assert found[0].text == "The key is [redacted:anthropic-key]"
    assert all(secret.encode() not in each.read_bytes() for each in path.parent.iterdir())


def test_what_is_old_is_forgotten_and_samples_stay(file: SampleFile, path: Path) -> None:
    file.keep("s", SAMPLE, Reply("key", (5,)), Response("resp_1", "p", None, (said(Role.USER, "Hi"),)))
    assert file.prune(1e12) == 2
    assert file.replies("s") == {}
    assert file.conversation("p", "resp_1") is None
    assert len(samplefile.pending(path)) == 1


def test_where_it_is_too_much_the_oldest_go_first(file: SampleFile) -> None:
    for number in range(10):
        file.keep("s", None, Reply(f"key{number}", (number,) * 10))
    size = len(samplefile.pack_ids((0,) * 10)) + 100
    file.prune(0.0, keep_bytes=2 * (3 * size + 50))
    assert list(file.replies("s")) == ["key7", "key8", "key9"]


def found(*, session: str | None = None, before: float | None = None, names: frozenset[str] = frozenset(), generated: bool = False) -> Found:
    return Found(Selection(session, before), 0, names, frozenset(), names, names, generated, ())


def test_purging_a_session_takes_its_tokens_and_leaves_the_others(file: SampleFile, path: Path) -> None:
    file.keep("gone", SAMPLE, Reply("key", (5,)), Response("resp_1", "p", None, (said(Role.USER, "purge me please"),)))
    file.keep("stays", replace(SAMPLE, flow_id="flow-2"), Reply("key", (6,)))
    assert purge_policy_file(path, found(session="gone", names=frozenset({"gone"}))) == []
    assert (file.replies("gone"), file.replies("stays")) == ({}, {"key": (6,)})
    assert [values["flow_id"] for _, values in samplefile.pending(path)] == ["flow-2"]
    assert all(b"purge me please" not in each.read_bytes() for each in path.parent.iterdir())
    assert file.forgotten() == 1


def test_purging_everything_leaves_nothing(file: SampleFile, path: Path) -> None:
    file.keep("s", SAMPLE, Reply("key", (5,)))
    assert purge_policy_file(path, found()) == []
    assert (file.replies("s"), samplefile.pending(path)) == ({}, [])


def test_purging_by_date_takes_what_is_older(file: SampleFile, path: Path) -> None:
    file.keep("s", SAMPLE)
    file.keep("s", replace(SAMPLE, flow_id="flow-2", created_at=SAMPLE.created_at + 100))
    assert purge_policy_file(path, found(before=SAMPLE.created_at + 50)) == []
    assert [values["flow_id"] for _, values in samplefile.pending(path)] == ["flow-2"]


def test_purging_a_client_that_names_no_session_takes_all_memory_but_no_samples(file: SampleFile, path: Path) -> None:
    file.keep("s", SAMPLE, Reply("key", (5,)))
    assert purge_policy_file(path, found(session="p-1", names=frozenset({"p-1"}), generated=True)) == []
    assert (file.replies("s"), len(samplefile.pending(path))) == ({}, 1)


def test_a_file_that_is_no_database_is_an_error_with_its_name(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreError, match=r"policy\.db can't be"):
        SampleFile(path)
    with pytest.raises(StoreError, match=r"policy\.db can't be read"):
        samplefile.pending(path)
    assert "policy.db can't be read" in purge_policy_file(path, found())[0]


def test_damaged_tokens_are_an_error() -> None:
    with pytest.raises(StoreError, match="damaged"):
        samplefile.unpack_ids(b"nonsense")


def test_what_was_kept_survives_a_kill(path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import time
from pathlib import Path
from metaclaw_core.store.samplefile import Reply, SampleFile
file = SampleFile(Path({str(path)!r}))
for number in range(1000):
    file.keep("s", None, Reply(f"key{{number}}", (number,)))
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = [process.stdout.readline().strip() for _ in range(20)][-1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with SampleFile(path) as file:
        known = file.replies("s")
    assert last == "19"
    assert {f"key{number}" for number in range(20)} <= known.keys()


def test_two_processes_may_use_the_file_at_once(file: SampleFile, path: Path) -> None:
    file.keep("s", SAMPLE)
    other = sqlite3.connect(path)
    other.execute("BEGIN").execute("SELECT * FROM samples").fetchall()
    file.keep("s", replace(SAMPLE, flow_id="flow-2"))
    other.close()
    assert len(samplefile.pending(path)) == 2
