"""mitmproxy listens a moment before it says that it runs; what comes in that moment is recorded like all else."""

from __future__ import annotations

from mitmproxy import http
from mitmproxy.test import taddons, tflow

from metaclaw_core.proxy.addon import MetaClaw
from metaclaw_core.store.db import open_store
from metaclaw_core.store.drain import drain_spools


async def test_a_request_that_comes_before_mitmproxy_says_that_it_runs_is_recorded(metaclaw_home):
    addon = MetaClaw(worker=False)
    with taddons.context(addon, loadcore=False) as context:
        context.options.server = False  # neither children nor a control socket
        flow = tflow.tflow(resp=True)
        flow.live = True
        flow.request = http.Request.make("POST", "https://api.example.com/v1/chat/completions", b'{"model":"m","messages":[]}', {})
        flow.response = None
        addon.requestheaders(flow)
        await addon.request(flow)
        flow.response = http.Response.make(200, b"{}", {"content-type": "application/json"})
        addon.responseheaders(flow)
        addon.response(flow)
        assert addon._runtime is not None
        current = addon._runtime
        addon.running()  # once is enough
        assert addon._runtime is current
        assert current.spool.flush()
        assert current.spool.written == 1
        current.close()
    with open_store(metaclaw_home / "store.db") as store:
        assert drain_spools(store, metaclaw_home / "spool").stored == 1
