"""The socket that a server of ours listens on: this machine only."""

from __future__ import annotations

import socket


def loopback_listener(port: int) -> socket.socket:
    """Bound to 127.0.0.1; port 0: any free one. Raises OSError, and nothing is left open then."""
    # The protocol is named because asyncio turns Nagle's delay of 40 ms a response off only where it is.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        listener.close()
        raise
    return listener
