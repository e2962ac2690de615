"""The process that started us: it speaks over our stdin and takes us along when it ends.

Design: JSON objects, one a line; what a child may not find on disk (a key, a token) comes this way and is never logged.
The end of stdin is the end of the parent, however it died, so no orphan survives.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

_MAX_LINE = 1 << 20


async def until_stdin_closes(stop: asyncio.Event, take: Callable[[Mapping[str, Any]], object]) -> None:
    """Hand each JSON object on stdin to `take`, and set `stop` at the end. What is no such line is passed over."""
    reader = asyncio.StreamReader(limit=_MAX_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while True:
        try:
            line = await reader.readline()
        except ValueError:  # longer than the limit; what follows is read on
            continue
        if not line:
            break
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(message, dict):
            take(message)
    stop.set()
