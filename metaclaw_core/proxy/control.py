"""One Unix socket per proxy: JSON lines in, JSON lines out.

Design: the few things one may ask of a running proxy are functions in a table, named ``status``,
``bypass``, ``flush``, ``forget``, ``drain`` and ``reload``; the command line and mitmproxy's own commands call the
same ones. None of them returns a credential or a body. The socket lies in a 0700 folder, so the file
system is the access control.

Limits: a path of a Unix socket holds about 100 bytes; for a longer home the socket lies in a private
folder under the system's temporary one, and ``run/<pid>.json`` says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from metaclaw_core.settings import private_dir

logger = logging.getLogger(__name__)

type Handler = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
COMMANDS = ("status", "bypass", "flush", "forget", "drain", "reload")
_MAX_PATH = 96
_MAX_LINE = 64 * 1024


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """What ``run/<pid>.json`` says."""

    pid: int
    socket: Path
    file: Path


class ControlServer:
    def __init__(self, home: Path, handlers: Mapping[str, Handler]) -> None:
        run = private_dir(home / "run")
        self._handlers = handlers
        self._file = run / f"{os.getpid()}.json"
        self.path = run / f"{os.getpid()}.sock"
        if len(str(self.path)) > _MAX_PATH:
            name = f"metaclaw-{os.getuid()}-{sha256(str(home).encode()).hexdigest()[:12]}"
            folder = private_dir(Path(tempfile.gettempdir()) / name)
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                raise OSError(f"{folder} belongs to another user")
            self.path = folder / f"{os.getpid()}.sock"
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        # Bound by hand, since asyncio yields while it binds and the umask belongs to the whole process.
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.path))
            self.path.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._client, sock=listener, limit=_MAX_LINE)
        except BaseException:
            listener.close()
            raise
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"pid": os.getpid(), "socket": str(self.path)}, file)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            self.path.unlink(missing_ok=True)
            self._file.unlink(missing_ok=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, ValueError):  # ValueError: a line over the limit
                while line := await reader.readline():
                    writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
            handler = self._handlers[message["command"]]
        except (ValueError, KeyError, TypeError):
            return {"error": f"send one JSON object a line with a command: {', '.join(COMMANDS)}"}
        try:
            return await handler(message)
        except (ValueError, TypeError, OSError) as e:
            return {"error": str(e)}
        except Exception as e:  # the boundary: who asks must get an answer
            logger.warning("metaclaw: the control command %s failed.", message["command"], exc_info=True)
            return {"error": f"{message['command']} failed: {e!r}"}


def running_proxies(home: Path) -> Iterator[RunningProxy]:
    """The proxies of this home that answer; files of proxies that were killed are removed."""
    for file in sorted((home / "run").glob("*.json")):
        try:
            found = json.loads(file.read_text())
            proxy = RunningProxy(int(found["pid"]), Path(found["socket"]), file)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        try:
            os.kill(proxy.pid, 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
            proxy.socket.unlink(missing_ok=True)
            continue
        except PermissionError:
            continue
        yield proxy


def call(proxy: RunningProxy, command: str, timeout: float = 10.0, **arguments: Any) -> dict[str, Any]:
    """One command to one proxy. Raises OSError if it does not answer within `timeout` seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(str(proxy.socket))
        connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        with connection.makefile("rb") as file:
            line = file.readline(_MAX_LINE)
    if not line:
        raise OSError("the proxy closed the connection")
    answer: dict[str, Any] = json.loads(line)
    return answer
