"""Captured flows, one exchange at a time: mitmproxy's own reader, our record.

Design: a generator over a file (mitmproxy dump or HAR) that yields an `Exchange` for each request on
an LLM path and None for everything else, so that the caller can count and show progress. What was
read before a file turns out to be damaged has been yielded by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from mitmproxy import exceptions, http
from mitmproxy.io import FlowReader

from metaclaw_core.errors import CaptureError
from metaclaw_core.model import Exchange
from metaclaw_core.proxy import capture
from metaclaw_core.wire import find_route


def read_exchanges(file: BinaryIO, name: str, key: bytes) -> Iterator[Exchange | None]:
    """Every flow of `file`: its exchange, or None where it is none of ours.

    Raises CaptureError where the file is no capture or breaks off.
    """
    count = 0
    try:
        for flow in FlowReader(file).stream():
            count += 1
            if not isinstance(flow, http.HTTPFlow):
                yield None
                continue
            found = find_route(flow.request.method, flow.request.path)
            yield capture.exchange(flow, found[1], key, live=False) if found else None
    except (exceptions.FlowReadException, OSError, ValueError, TypeError, KeyError) as e:
        if count:
            raise CaptureError(f"{name} breaks off after {count} flows ({e}); the flows before that are recorded.") from e
        raise CaptureError(f"{name} is neither a mitmproxy capture nor a HAR file ({e}).") from e
    if not count:
        raise CaptureError(f"{name} holds no flow.")
