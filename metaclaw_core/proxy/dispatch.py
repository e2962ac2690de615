"""Which addon listens to which event, looked up once.

Design: mitmproxy asks every addon about every event of every flow, and once more for the `update` after it. With the few
addons of the lean proxy nearly all of these questions have the answer no. `DirectAddons` keeps the answer per event, from the
same enumeration as mitmproxy's own, and forgets it whenever an addon comes or goes. Order, error handling and `AddonHalt`
are mitmproxy's.

Limits: an addon that grows a hook while it runs is not heard until the next one is added or removed; with ``--no-lean`` it
is. What mitmproxy calls outside of the event loop (`load`, `configure`) goes its way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mitmproxy import exceptions, hooks
from mitmproxy.addonmanager import AddonManager, safecall
from mitmproxy.flow import Flow

type _Hooks = tuple[Callable[..., Any], ...]  # of one addon of the chain and the addons within it


class DirectAddons(AddonManager):
    def __init__(self, master: Any) -> None:
        super().__init__(master)  # type: ignore[no-untyped-call]
        self._listening: dict[str, tuple[_Hooks, ...]] = {}  # by event, in the order of the chain

    def register(self, addon: Any) -> Any:
        self._listening.clear()
        return super().register(addon)  # type: ignore[no-untyped-call]

    def remove(self, addon: Any) -> None:
        self._listening.clear()
        super().remove(addon)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        self._listening.clear()
        super().clear()  # type: ignore[no-untyped-call]

    async def handle_lifecycle(self, event: hooks.Hook) -> None:
        args = event.args()
        if listening := self._of(event):
            await self._tell(listening, args)
        if isinstance(flow := args[0], Flow):
            updated = self._listening.get(hooks.UpdateHook.name)
            if updated is None:
                updated = self._of(hooks.UpdateHook([flow]))
            if updated:
                await self._tell(updated, [[flow]])

    async def trigger_event(self, event: hooks.Hook) -> None:
        await self._tell(self._of(event), event.args())

    async def _tell(self, listening: tuple[_Hooks, ...], args: list[Any]) -> None:
        for listeners in listening:
            try:
                for listener in listeners:
                    waiting = listener(*args)
                    if waiting is not None and inspect.isawaitable(waiting):
                        await waiting
            except exceptions.AddonHalt:
                return
            except Exception:
                with safecall():  # which reports it or lets it go on; entered here, since each `with` costs as much as a hook
                    raise

    def _of(self, event: hooks.Hook) -> tuple[_Hooks, ...]:
        found = self._listening.get(event.name)
        if found is None:
            every: list[_Hooks] = []
            for addon in self.chain:
                with safecall():  # one whose hook is no function is reported, and left out
                    every.append(tuple(function for _, function in self._iter_hooks(addon, event)))
            found = self._listening[event.name] = tuple(one for one in every if one)
        return found
