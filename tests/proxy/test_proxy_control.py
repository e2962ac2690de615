import asyncio
import contextlib
import json
import os
import socket
import stat
from contextlib import closing

import pytest

from metaclaw_core.proxy.control import ControlServer, RunningProxy, call, running_proxies


async def hello(message):
    return {"hello": message.get("name")}


async def refuses(message):
    raise ValueError("no")


async def breaks(message):
    raise RuntimeError("a bug")


@pytest.fixture
async def server(tmp_path):
    control = ControlServer(tmp_path / "home", {"status": hello, "bypass": refuses, "flush": breaks})
    await control.start()
    yield control
    control.close()


async def ask(home, *arguments, **named):
    (proxy,) = running_proxies(home)
    return await asyncio.to_thread(call, proxy, *arguments, **named)


async def test_a_command_gets_its_answer_and_its_errors_as_data(server, tmp_path, caplog):
    home = tmp_path / "home"
    assert await ask(home, "status", name="x") == {"hello": "x"}
    assert await ask(home, "bypass") == {"error": "no"}
    assert await ask(home, "flush") == {"error": "flush failed: RuntimeError('a bug')"}
    assert "send one JSON object a line" in (await ask(home, "what"))["error"]


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b"{}\n", b'{"command": []}\n', b"\xff\n", b"null\n"])
async def test_a_line_that_is_no_command_is_answered_and_the_next_one_works(server, line):
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(line + b'{"command": "status"}\n')
    assert "error" in json.loads(await reader.readline())
    assert json.loads(await reader.readline()) == {"hello": None}
    writer.close()
    await writer.wait_closed()


async def test_a_line_without_end_closes_the_connection(server):
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(b"x" * (1 << 20))
    with contextlib.suppress(ConnectionError):  # reset or closed, as the kernel likes
        assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_socket_and_file_are_private_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        control = ControlServer(tmp_path / "home", {"status": hello})
        await control.start()
    finally:
        os.umask(old)
    for path in (tmp_path / "home" / "run").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "home" / "run").stat().st_mode) == 0o700
    control.close()
    assert list((tmp_path / "home" / "run").iterdir()) == []
    control.close()  # twice is once


async def test_a_start_changes_no_umask_while_others_make_files(tmp_path):
    seen = []

    async def look():
        for _ in range(20):
            mask = os.umask(0o22)
            os.umask(mask)
            seen.append(mask)
            await asyncio.sleep(0)

    mask = os.umask(0o22)
    os.umask(mask)
    looking = asyncio.ensure_future(look())
    control = ControlServer(tmp_path / "home", {})
    await control.start()
    await looking
    control.close()
    assert set(seen) == {mask}


async def test_a_home_with_a_long_path_gets_its_socket_elsewhere(tmp_path):
    home = tmp_path / ("long" * 30)
    control = ControlServer(home, {"status": hello})
    await control.start()
    try:
        assert len(str(control.path)) <= 96
        assert stat.S_IMODE(control.path.parent.stat().st_mode) == 0o700
        assert await ask(home, "status") == {"hello": None}
    finally:
        control.close()
        control.path.parent.rmdir()


def test_files_of_dead_proxies_are_removed_and_others_left_alone(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    (run / "dead.sock").touch()
    (run / "1.json").write_text(json.dumps({"pid": child, "socket": str(run / "dead.sock")}))
    (run / "2.json").write_text("half a fi")
    (run / "3.json").write_text(json.dumps({"pid": os.getpid(), "socket": str(run / "ours.sock")}))
    assert list(running_proxies(tmp_path)) == [RunningProxy(os.getpid(), run / "ours.sock", run / "3.json")]
    assert sorted(path.name for path in run.iterdir()) == ["2.json", "3.json"]


def test_a_proxy_that_does_not_answer_is_an_error_after_the_timeout(tmp_path):
    path = tmp_path / "s.sock"
    with closing(socket.socket(socket.AF_UNIX)) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        with pytest.raises(OSError, match="timed out"):
            call(RunningProxy(1, path, path), "status", timeout=0.1)
    with pytest.raises(OSError, match="refused"):
        call(RunningProxy(1, path, path), "status", timeout=0.1)
