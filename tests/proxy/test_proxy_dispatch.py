from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from mitmproxy import exceptions, http, options
from mitmproxy.addonmanager import AddonManager
from mitmproxy.master import Master
from mitmproxy.proxy.layers.http import HttpRequestHook, HttpResponseHook
from mitmproxy.test import tflow

from metaclaw_core.proxy.dispatch import DirectAddons

type Make = Callable[[Any], AddonManager]


class Listener:
    """Writes down what it is told."""

    def __init__(self, name: str, log: list[str], addons: tuple[Any, ...] = (), raises: type[Exception] | None = None) -> None:
        self.name, self.log, self.raises = name, log, raises
        if addons:
            self.addons = addons

    def request(self, flow: http.HTTPFlow) -> None:
        self.log.append(f"{self.name}: request")
        if self.raises is not None:
            raise self.raises("as planned")


class Slow(Listener):
    async def request(self, flow: http.HTTPFlow) -> None:  # type: ignore[override]
        self.log.append(f"{self.name}: began")
        await asyncio.sleep(0)
        self.log.append(f"{self.name}: ended")


class Watcher:
    name = "watcher"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def update(self, flows: list[http.HTTPFlow]) -> None:
        self.log.append(f"watcher: update of {len(flows)}")


class Odd:
    name = "odd"
    request = 7  # no function


async def told(make: Make, addons: Callable[[list[str]], list[Any]]) -> list[str]:
    log: list[str] = []
    master = Master(options.Options())
    master.addons = make(master)
    master.addons.add(*addons(log))
    for _ in range(2):
        await master.addons.handle_lifecycle(HttpRequestHook(tflow.tflow()))
        await master.addons.handle_lifecycle(HttpResponseHook(tflow.tflow(resp=True)))
    return log


CHAINS: dict[str, Callable[[list[str]], list[Any]]] = {
    "one after the other": lambda log: [Listener("a", log), Slow("b", log), Watcher(log), Listener("c", log)],
    "one within another": lambda log: [Listener("a", log, (Listener("b", log), Slow("c", log, (Listener("d", log),))))],
    "an error keeps only its own children from hearing": lambda log: [
        Listener("a", log, (Listener("b", log),), raises=ValueError),
        Listener("c", log),
        Watcher(log),
    ],
    "a halt keeps all after it from hearing": lambda log: [
        Listener("a", log),
        Listener("b", log, raises=exceptions.AddonHalt),
        Listener("c", log),
        Watcher(log),
    ],
    "a hook that is no function": lambda log: [Odd(), Listener("a", log)],
    "nobody": lambda log: [],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_addons_hear_what_mitmproxys_own_dispatch_would_tell_them(chain: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    assert asyncio.run(told(DirectAddons, CHAINS[chain])) == asyncio.run(told(AddonManager, CHAINS[chain]))


def test_an_addon_that_comes_later_hears_the_next_event_and_one_that_went_hears_none() -> None:
    async def case() -> list[str]:
        log: list[str] = []
        master = Master(options.Options())
        master.addons = DirectAddons(master)
        first, second = Listener("first", log), Listener("second", log)
        master.addons.add(first)
        await master.addons.handle_lifecycle(HttpRequestHook(tflow.tflow()))
        master.addons.add(second)
        await master.addons.handle_lifecycle(HttpRequestHook(tflow.tflow()))
        master.addons.remove(first)
        await master.addons.handle_lifecycle(HttpRequestHook(tflow.tflow()))
        return log

    assert asyncio.run(case()) == ["first: request", "first: request", "second: request", "second: request"]


def test_a_script_that_is_loaded_again_is_heard_in_its_new_form(tmp_path: Any) -> None:
    from mitmproxy.addons.script import Script

    async def case() -> list[str]:
        log: list[str] = []
        master = Master(options.Options())
        master.addons = DirectAddons(master)
        file = tmp_path / "told.py"
        file.write_text("def request(flow):\n    flow.metadata['log'].append('old')\n")
        script = Script(str(file), True)
        script.reloadtask.cancel()  # its own look at the file comes only every second
        master.addons.add(script)
        script.loadscript()

        async def tell() -> None:
            flow = tflow.tflow()
            flow.metadata["log"] = log
            await master.addons.handle_lifecycle(HttpRequestHook(flow))

        await tell()
        file.write_text("def request(flow):\n    flow.metadata['log'].append('new form')\n")
        script.loadscript()
        await tell()
        return log

    assert asyncio.run(case()) == ["old", "new form"]
