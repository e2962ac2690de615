"""The addon under mitmproxy's own test context: no socket, no child."""

import asyncio
import contextlib
import json
import sqlite3

import pytest
from mitmproxy import http
from mitmproxy.test import taddons, tflow

from metaclaw_core.proxy import runtime
from metaclaw_core.proxy.addon import MetaClaw
from metaclaw_core.store.spool import SpoolReader

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "How do I resolve a git rebase conflict?"}]}).encode()


@pytest.fixture
async def running(metaclaw_home):
    addon = MetaClaw(worker=False)
    with taddons.context() as tctx:
        tctx.master.addons.add(addon)
        tctx.configure(addon)
        await addon.running()
        yield tctx, addon
        tctx.master.should_exit.set()
        addon.done()
        await asyncio.sleep(0)


def flow_of(body: bytes = BODY, path: str = "/v1/chat/completions") -> http.HTTPFlow:
    flow = tflow.tflow()
    flow.request = http.Request.make("POST", f"http://llm.test{path}", body, {"content-type": "application/json"})
    flow.live = True
    return flow


async def through(addon: MetaClaw, flow: http.HTTPFlow, answer: bytes = b'{"choices":[]}') -> None:
    addon.requestheaders(flow)
    await addon.request(flow)
    flow.response = http.Response.make(200, answer, {"content-type": "application/json"})
    addon.responseheaders(flow)
    addon.response(flow)


def recorded(home) -> list[tuple[bytes, bytes]]:
    rows = []
    for path in sorted((home / "spool").glob("*.db")):
        with SpoolReader(path) as reader:
            rows += [(exchange.request_body, exchange.response_body) for _, exchange in reader.batch(100)]
    return rows


async def test_mitmproxys_commands_do_what_the_control_socket_does(running, metaclaw_home):
    tctx, addon = running
    call = tctx.master.commands.call
    assert json.loads(call("metaclaw.status"))["bypass"] is False
    assert call("metaclaw.bypass", "on") == "True"
    flow = flow_of()
    await through(addon, flow)
    assert flow.request.raw_content == BODY
    assert call("metaclaw.bypass", "off") == "False"
    flow = flow_of()
    await through(addon, flow)
    assert b"<metaclaw-skills>" in (flow.request.raw_content or b"")
    await call("metaclaw.flush")
    assert recorded(metaclaw_home) == [(BODY, b'{"choices":[]}')] * 2  # the client's own body both times
    call("metaclaw.reload")


async def test_a_bypass_that_is_neither_on_nor_off_is_refused(running):
    tctx, _ = running
    with pytest.raises(ValueError, match="on or off"):
        tctx.master.commands.call("metaclaw.bypass", "perhaps")


async def test_a_captured_flow_is_recorded_and_not_touched(running, metaclaw_home):
    tctx, addon = running
    flow = flow_of()
    flow.live = False
    await through(addon, flow)
    assert flow.request.raw_content == BODY
    await tctx.master.commands.call("metaclaw.flush")
    assert len(recorded(metaclaw_home)) == 1


async def test_a_request_that_mitmproxy_streams_is_neither_rewritten_nor_recorded(running):
    _, addon = running
    flow = flow_of()
    flow.request.stream = True
    await through(addon, flow)
    status = addon._service.status()
    assert status["counters"] == {"passed: the request was streamed, not recorded": 1}
    assert status["open_requests"] == 0


async def test_an_answer_that_another_addon_gave_leaves_the_request_alone(running):
    _, addon = running
    flow = flow_of()
    addon.requestheaders(flow)
    flow.response = http.Response.make(200, b"mine")
    await addon.request(flow)
    assert flow.request.raw_content == BODY


async def test_a_killed_flow_leaves_nothing_behind(running):
    _, addon = running
    flow = flow_of()
    addon.requestheaders(flow)
    await addon.request(flow)
    flow.kill()
    addon.error(flow)
    assert addon._service.status()["open_requests"] == 0


async def test_settings_that_change_reach_the_next_request(running, metaclaw_home):
    tctx, addon = running
    tctx.configure(addon, metaclaw_skills_enabled="false")
    flow = flow_of()
    await through(addon, flow)
    assert flow.request.raw_content == BODY
    tctx.configure(addon, metaclaw_skills_enabled="true")
    flow = flow_of()
    await through(addon, flow)
    assert flow.request.raw_content != BODY


async def test_a_reload_of_the_script_keeps_open_flows_sessions_and_index(running, metaclaw_home):
    tctx, old = running
    flow = flow_of()
    old.requestheaders(flow)
    await old.request(flow)
    leaving = old.done()
    new = MetaClaw(worker=False)
    (metaclaw_home / "config.yaml").write_text("skills: [")  # broken just now: the last good settings stay
    new.configure(set())
    await new.running()
    assert new.settings == old.settings
    flow.response = http.Response.make(200, b"{}")
    new.response(flow)
    status = new._service.status()
    assert status["counters"]["exchanges"] == 1
    assert status["skills"]["count"] > 50
    tctx.master.should_exit.set()  # before the predecessor's grace is over
    new.done()
    assert runtime.current(metaclaw_home) is None  # closed, hence written
    assert len(recorded(metaclaw_home)) == 1
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving


async def test_a_request_without_a_runtime_passes():
    addon = MetaClaw(worker=False)
    flow = flow_of()
    await through(addon, flow)
    assert flow.request.raw_content == BODY
    assert addon.done() is None


async def test_session_state_survives_in_its_file(running, metaclaw_home):
    tctx, addon = running
    await through(addon, flow_of())
    await tctx.master.commands.call("metaclaw.flush")
    with contextlib.closing(sqlite3.connect(metaclaw_home / "run" / "sessions.db")) as db:
        ((value,),) = db.execute("SELECT value FROM sessions").fetchall()
    assert "git-rebase-conflicts" in json.loads(value)["skills"]
