"""Secrets out of what mitmproxy itself writes: ``-w``, ``hardump`` and the save commands.

Design: on with ``proxy.redact_dumps``. mitmproxy's own writers come after scripts, so what is replaced in the last
hook of a flow is replaced in every file. By then the request is at its server. The answer must be at its
client too, or he would get the placeholder: so answers are streamed with a tee while the setting is on,
and of a live answer that was not streamed (another addon made it) nothing is replaced. Replaced are the
values of credential headers, of secret query parameters, what has a secret's shape in bodies, WebSocket
messages and other headers, and the name and password of ``proxyauth``. What can't be decoded can't be
searched and is left out.

Limits: shapes, as in `redact`. TCP, UDP and DNS flows are not looked at. A replay with ``-C`` lacks its
keys, and an import of such a file sees all callers as one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mitmproxy import ctx, http

from metaclaw_core.decode import decode_body
from metaclaw_core.errors import WireError
from metaclaw_core.proxy.tee import Tee
from metaclaw_core.redact import redact, redact_answer, redact_header, redact_path

logger = logging.getLogger(__name__)

_LIMIT = 64 << 20


class RedactDumps:
    """Must stand after the addon that records, which sees the flow as it was. `wanted`: is the setting on?"""

    name = "metaclaw-dumps"

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self._wanted = wanted
        self._open: dict[str, http.HTTPFlow] = {}
        self._tees: dict[str, Tee] = {}

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        self._open[flow.id] = flow

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        response = flow.response
        if self._wanted() and flow.live and response is not None and not response.stream and response.status_code != 101:
            self._tees[flow.id] = response.stream = Tee(_LIMIT)

    def response(self, flow: http.HTTPFlow) -> None:
        tee = self._tees.pop(flow.id, None)
        if tee is not None and flow.response is not None and flow.response.data.content is None and not tee.overflow:
            flow.response.data.content = tee.body()
        if flow.websocket is None:
            self._finish(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        self.response(flow)

    def websocket_end(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def done(self) -> None:
        if ctx.master.should_exit.is_set():  # not a reload: mitmproxy now writes what is still open
            for flow in list(self._open.values()):
                self._finish(flow)

    def _finish(self, flow: http.HTTPFlow) -> None:
        self._open.pop(flow.id, None)
        if not self._wanted():
            return
        try:
            redact_flow(flow)
        except Exception:  # what could not be searched is not written
            logger.exception("metaclaw: a flow could not be redacted; its headers and bodies are left out of the dump.")
            for message in filter(None, (flow.request, flow.response)):
                message.headers.clear()
                message.trailers = message.data.content = None
            flow.request.path, flow.websocket = "/", None


def redact_flow(flow: http.HTTPFlow) -> None:
    """Replace what is secret in a flow that is over."""
    flow.request.path = redact_path(flow.request.path)
    _redact_message(flow.request)
    response = flow.response
    if response is not None and (response.stream or flow.error or flow.websocket or not flow.live):
        _redact_message(response)
    if flow.websocket is not None:
        for message in flow.websocket.messages:
            message.content = redact(message.content)[0]
    if "proxyauth" in flow.metadata:
        flow.metadata["proxyauth"] = ["[redacted]", "[redacted]"]


def _redact_message(message: http.Message) -> None:
    for headers in (message.headers, message.trailers):
        if headers is not None:
            headers.fields = tuple(redact_header(name, value) for name, value in headers.fields)
    body = message.data.content
    if not body:
        return
    encoding = message.headers.get("content-encoding", "")
    try:
        found = redact_answer(decode_body(body, encoding, _LIMIT)[0])
    except WireError:
        found = b"[left out: its content-encoding can't be undone]", 1
    if found[1]:
        message.data.content = found[0]
        message.headers.pop("content-encoding", None)
        if "content-length" in message.headers:
            message.headers["content-length"] = str(len(found[0]))
