"""Lean mode refuses by name what needs a part of mitmproxy that it leaves out, and says how to get it."""

from __future__ import annotations

import asyncio

import pytest
from mitmproxy import options
from mitmproxy.tools.dump import DumpMaster

from metaclaw_core.errors import ConfigError
from metaclaw_core.proxy.master import Lean as LeanMaster
from metaclaw_core.proxy.master import _configure, _serve
from metaclaw_core.proxy.startoptions import StartOptions

LEFT_OUT = {
    *("anticache", "anticomp", "block_global", "block_list", "block_private", "client_replay", "client_replay_concurrency"),
    *("command_history", "dns_name_servers", "dns_use_hosts_file", "export_preserve_original_ip", "hardump", "keep_alt_svc_header"),
    *("keepserving", "map_local", "map_remote", "modify_body", "modify_headers", "onboarding", "onboarding_host", "proxyauth"),
    *("readfile_filter", "rfile", "save_stream_file", "save_stream_filter", "stickyauth", "stickycookie", "strip_ech", "upstream_auth"),
}
PRINTING = {"flow_detail", "dumper_filter", "dumper_default_contentview"}


async def known(lean: bool) -> set[str]:
    opts = options.Options()
    if lean:
        LeanMaster(opts)
    else:
        DumpMaster(opts, with_termlog=False)
    return set(opts.keys())


async def refusal(*sets: str, lean: bool = True) -> str:
    with pytest.raises(ConfigError) as refused:
        await _serve(StartOptions(port=1, lean=lean, sets=sets))
    return str(refused.value)


async def test_what_lean_leaves_out_of_mitmproxys_options_is_known():
    left_out = await known(lean=False) - await known(lean=True)
    assert {name for name in left_out if not name.startswith("server_replay")} - PRINTING == LEFT_OUT


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
async def test_each_option_of_a_part_that_is_left_out_is_refused_by_name_with_the_remedy(metaclaw_home, name):
    assert await refusal(f"{name}=1") == f"--set {name} needs a part of mitmproxy that the lean proxy leaves out: add --no-lean."


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("name", sorted(PRINTING))
async def test_printing_flows_is_mitmdumps_with_and_without_lean(metaclaw_home, name, lean):
    assert await refusal(f"{name}=1", lean=lean) == (
        f"--set {name} is about printing flows, which metaclaw start does not: run mitmdump with the addon (`metaclaw addon-path`)."
    )


@pytest.mark.parametrize("mode", ["dns", "dns@5353", "wireguard"])
async def test_a_mode_that_needs_the_resolver_is_refused(metaclaw_home, mode):
    assert await refusal(f"mode={mode}") == f"--set mode={mode} needs mitmproxy's DNS resolver, which the lean proxy leaves out: add --no-lean."


async def test_no_lean_takes_them(metaclaw_home, unused_tcp_port):
    master = DumpMaster(options.Options(), with_termlog=False, with_dumper=False)
    from metaclaw_core.proxy.addon import addons_for_script

    master.addons.add(*addons_for_script())
    _configure(master, StartOptions(port=unused_tcp_port, lean=False, sets=("anticache=true", "stickycookie=.*")))
    assert (master.options.anticache, master.options.stickycookie) == (True, ".*")
    await asyncio.sleep(0)
