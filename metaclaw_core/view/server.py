"""The page's HTTP server: loopback only, one reader, nothing can be changed through it.

Design: conversations are private, and any web page in the reader's browser and any program of another user can reach a
loopback port. So:
  - the printed URL carries a token that works once; it buys a cookie (HttpOnly, SameSite=Strict) and is worthless then.
    The answer to it is a page that moves on, not a redirect: browsers leave strict cookies out of redirects that began
    on another site;
  - the Host header must name this very port on 127.0.0.1 or localhost, which no DNS-rebinding page can say;
  - requests that another origin made are refused where the browser says so (Sec-Fetch-Site), no CORS header is ever
    sent, and nobody may frame or embed a page;
  - only GET and HEAD are answered; scripts, styles and pictures come from here or not at all (Content-Security-Policy).
Each answer closes its connection, so an unread body can't become the next request.

Limits: the browser gets the URL as an argument, which other users of the machine may read in the list of processes in
the moment before it is used; open the printed URL by hand (--no-browser) where that matters. Cookies don't know ports:
another program on 127.0.0.1 that the reader visits gets the cookie, too, and can use it while this runs.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from metaclaw_core.errors import MetaClawError
from metaclaw_core.view.site import Reply, Site, query_of

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 10.0  # a client that says nothing for so long is dropped
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Server(ThreadingHTTPServer):
    """Serves `site` on 127.0.0.1 (port 0: any free one). Raises OSError if the port is taken."""

    daemon_threads = True
    allow_reuse_address = True  # at once again after an end
    allow_reuse_port = False  # nobody else beside us

    def __init__(self, site: Site, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.site = site
        self.port: int = self.server_address[1]
        self.hosts = frozenset({f"127.0.0.1:{self.port}", f"localhost:{self.port}"})
        self.cookie_name = f"metaclaw-{self.port}"
        self._trading = threading.Lock()
        self._cookie = secrets.token_urlsafe(32)
        self._token: str | None = secrets.token_urlsafe(32)
        self.url = f"http://127.0.0.1:{self.port}/?token={self._token}"

    def trade(self, token: str) -> str | None:
        """The cookie for the token, once; None for anything else."""
        with self._trading:  # of two at once only one gets it
            if self._token is None or not _same(token, self._token):
                return None
            self._token = None
        return self._cookie

    def knows(self, cookie: str) -> bool:
        return _same(cookie, self._cookie)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # the reader went away
            logger.exception("metaclaw: a request of the page failed")

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the resolver for the machine's name, which may take seconds
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]


def _same(given: str, held: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "surrogatepass"), held.encode())


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        try:
            reply, cookie = self._answer()
        except MetaClawError as e:
            reply, cookie = self.server.site.message(HTTPStatus.SERVICE_UNAVAILABLE, str(e)), None
        except Exception:  # the boundary: the reader gets a page, the terminal what went wrong
            logger.exception("metaclaw: the page %s failed", self.path.partition("?")[0])
            text = "This page failed; the terminal of `metaclaw open` says how."
            reply, cookie = self.server.site.message(HTTPStatus.INTERNAL_SERVER_ERROR, text), None
        self._send(reply, cookie)

    do_HEAD = do_GET

    def _refuse_method(self) -> None:
        text = "This page is for reading: GET and HEAD only."
        self._send(self.server.site.message(HTTPStatus.METHOD_NOT_ALLOWED, text))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def _answer(self) -> tuple[Reply, str | None]:
        """The reply, and the cookie to set with it."""
        site = self.server.site
        if not self._meant_for_us():
            return site.message(HTTPStatus.FORBIDDEN, "This page is only reached under its own address."), None
        path, _, query = self.path.partition("?")
        asked = query_of(query)
        token = asked.get("token")
        if token is None and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return site.message(HTTPStatus.FORBIDDEN, "Another site may not look in here."), None
        if not self._has_cookie():
            cookie = self.server.trade(token) if token is not None and self.command == "GET" else None
            if cookie is None:
                text = "This link was used already or is not right. Run `metaclaw open` again for a new one."
                return site.message(HTTPStatus.FORBIDDEN, text), None
            return self._move_on(path), cookie
        if token is not None:  # the link again, by who has used it
            return self._move_on(path), None
        return site.reply(path, asked), None

    def _move_on(self, path: str) -> Reply:
        """To the same page under an address without the token."""
        site = self.server.site
        return site.message(HTTPStatus.OK, "One moment …", go_to=path if site.has(path) else "/")

    def _meant_for_us(self) -> bool:
        hosts = self.headers.get_all("Host") or []
        return len(hosts) == 1 and hosts[0].strip().lower() in self.server.hosts and self.path.startswith("/")

    def _has_cookie(self) -> bool:
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load("; ".join(self.headers.get_all("Cookie") or []))
        except CookieError:
            return False
        found = jar.get(self.server.cookie_name)
        return found is not None and self.server.knows(found.value)

    # --- out ----------------------------------------------------------------------------------

    def _send(self, reply: Reply, cookie: str | None = None) -> None:
        self.close_connection = True
        self.send_response(reply.status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if reply.status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if cookie is not None:
            self.send_header("Set-Cookie", f"{self.server.cookie_name}={cookie}; Path=/; HttpOnly; SameSite=Strict")
        self.send_header("Content-Type", reply.type)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser of requests refuses (too long, no HTTP, a method nobody knows), with our headers."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._send(self.server.site.message(status, "This request can't be answered."))

    def version_string(self) -> str:
        return "metaclaw"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line would hold the token, and what is read is nobody's business."""
