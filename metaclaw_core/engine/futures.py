"""Results that clients come back for.

Design: the SDK sends work, gets a request id, and asks for it by long poll. An id is derived from the client's own
sequence number, so a request that is sent again (a lost reply) meets its first result and is not done twice. A result
is freed `KEEP_FETCHED` seconds after it was fetched (the reply may be lost as well) and `KEEP_UNFETCHED` after it was
done if nobody came. Who asks later gets 410, which the SDK's sampling client takes as "send the request again".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

KEEP_FETCHED = 60.0  # seconds
KEEP_UNFETCHED = 3600.0


@dataclass(frozen=True)
class Reply:
    content: bytes
    media_type: str = "application/json"


@dataclass
class _Entry:
    done: asyncio.Event = field(default_factory=asyncio.Event)
    reply: Reply | None = None
    expires: float | None = None
    """On the clock; None while the work goes on."""


class Futures:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, request_id: str) -> bool:
        """False if the id is known: then the work is being done or is done already."""
        self._free()
        if request_id in self._entries:
            return False
        self._entries[request_id] = _Entry()
        return True

    def resolve(self, request_id: str, reply: Reply) -> None:
        """On the event loop. An id that was dropped meanwhile is ignored."""
        if entry := self._entries.get(request_id):
            entry.reply, entry.expires = reply, self._clock() + KEEP_UNFETCHED
            entry.done.set()

    async def wait(self, request_id: str, timeout: float) -> Reply | None:  # noqa: ASYNC109 - the poll's own length
        """The result, or None if it isn't there within `timeout` seconds. KeyError: unknown or freed."""
        self._free()
        entry = self._entries[request_id]
        try:
            async with asyncio.timeout(timeout):
                await entry.done.wait()
        except TimeoutError:
            return None
        entry.expires = self._clock() + KEEP_FETCHED
        return entry.reply

    def drop(self, request_id: str) -> None:
        self._entries.pop(request_id, None)

    def _free(self) -> None:
        now = self._clock()
        for request_id in [key for key, entry in self._entries.items() if entry.expires and entry.expires <= now]:
            del self._entries[request_id]
