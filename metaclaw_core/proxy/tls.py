"""Clients that don't trust our CA keep their network: their next try is tunnelled.

Design: an agent runs git, curl and pip, and none of them knows a CA that was given to the agent's own
process. The first handshake fails (nothing can mend that); for the next ten minutes the same client
gets that host with its original certificate, unrecorded, and one warning names the setting. Only where
the user left ``allow_hosts`` and ``ignore_hosts`` alone: who set them has decided.

Not every client says why it leaves. One that only hangs up during the handshake may mean distrust, or a
request that it gave up (OpenClaw does that around a compaction); others (git with GnuTLS) finish the
handshake, look at the certificate afterwards and hang up without a word. Both count only where that
client has never made a request to that host through us: a request is the proof of trust.

Limits: a client is its address, since nothing else is known before the handshake; so on one machine
a git without the CA sends an agent with the CA past us too, but only for the same host.
"""

from __future__ import annotations

import logging
import time

from mitmproxy import connection, ctx, http, tcp, tls

logger = logging.getLogger(__name__)

TUNNEL_SECONDS = 600.0
HANG_UP_SECONDS = 5.0  # a client that distrusts doesn't keep the connection for longer
_MAX = 1000


class TunnelUntrusting:
    name = "metaclaw-tunnel"

    def __init__(self) -> None:
        self._until: dict[tuple[str, str], float] = {}
        self._warned: set[str] = set()
        self._trusting: set[tuple[str, str]] = set()
        self._silent: dict[str, tuple[tuple[str, str], float]] = {}  # open connections without a request, by their id

    def tls_established_client(self, data: tls.TlsData) -> None:
        key = _key(data.context)
        if key not in self._trusting and not self._user_decides():
            self._silent[data.conn.id] = key, time.monotonic()

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        self._spoke(flow)

    def tcp_start(self, flow: tcp.TCPFlow) -> None:
        self._spoke(flow)

    def client_disconnected(self, client: connection.Client) -> None:
        if client.id not in self._silent:
            return
        key, since = self._silent.pop(client.id)
        if key not in self._trusting and time.monotonic() - since < HANG_UP_SECONDS:
            self._tunnel(key)

    def _spoke(self, flow: http.HTTPFlow | tcp.TCPFlow) -> None:
        if flow.client_conn.id in self._silent:
            if len(self._trusting) >= _MAX:
                self._trusting.clear()
            self._trusting.add(self._silent.pop(flow.client_conn.id)[0])

    def tls_failed_client(self, data: tls.TlsData) -> None:
        # mitmproxy's two messages for it both name trust; other failures (a protocol error, an abort) don't.
        error = data.conn.error or ""
        if "trust" not in error or self._user_decides():
            return
        key = _key(data.context)
        if key in self._trusting and "disconnected" in error:
            return
        self._tunnel(key)

    def _tunnel(self, key: tuple[str, str]) -> None:
        if len(self._until) >= _MAX:
            self._until.clear()
            self._warned.clear()
        self._until[key] = time.monotonic() + TUNNEL_SECONDS
        if key[1] not in self._warned:
            self._warned.add(key[1])
            logger.warning(
                "metaclaw: a client does not trust our CA for %s; for 10 minutes it gets this host untouched and unrecorded. "
                "An agent needs NODE_EXTRA_CA_CERTS=%s/mitmproxy-ca-cert.pem in its environment before it starts.",
                key[1],
                ctx.options.confdir,
            )

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        if not self._until or self._user_decides():
            return
        until = self._until.get(_key(data.context))
        if until is not None and time.monotonic() < until:
            data.ignore_connection = True

    @staticmethod
    def _user_decides() -> bool:
        return bool(ctx.options.allow_hosts or ctx.options.ignore_hosts)


def _key(context: object) -> tuple[str, str]:
    client = context.client  # type: ignore[attr-defined]
    server = context.server  # type: ignore[attr-defined]
    host = client.sni or (server.address[0] if server.address else "")
    return client.peername[0], host
