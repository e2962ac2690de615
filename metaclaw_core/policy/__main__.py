"""The policy server as a process: ``python -m metaclaw_core.policy --follow-stdin``, or ``metaclaw policy`` by hand.

Design: started by the proxy it takes its token from the first JSON line on stdin (``{"token": "…"}``) and ends when stdin
closes. Its port is free, and told in the heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.listener import loopback_listener
from metaclaw_core.parent import until_stdin_closes
from metaclaw_core.settings import home, load_settings, private_dir

logger = logging.getLogger("metaclaw.policy")


async def serve(
    token: str | None = None, *, port: int = 0, follow_stdin: bool = False, ready: Callable[[str], None] | None = None
) -> None:
    """Serve on 127.0.0.1 until SIGTERM, SIGINT or, with `follow_stdin`, the end of stdin.

    `token`: None: the first line on stdin brings it. `port`: 0: any free one. `ready` gets the URL once it listens, which
    is before anything can be sampled. Raises MetaClawError if it can't.
    """
    _need_libraries()
    import uvicorn

    from metaclaw_core.policy.server import create_app
    from metaclaw_core.policy.service import Policy

    stop, given = asyncio.Event(), asyncio.get_running_loop().create_future()

    def take(message: Mapping[str, Any]) -> None:
        if isinstance(message.get("token"), str) and not given.done():
            given.set_result(message["token"])

    if token is not None:
        given.set_result(token)
    listener = _listen(port)
    tasks: list[asyncio.Future[Any]] = []
    try:
        policy = Policy(load_settings(), private_dir(home()), listener.getsockname()[1])
        living, stopping = asyncio.ensure_future(policy.run()), asyncio.ensure_future(stop.wait())
        tasks = [living, stopping]
        if follow_stdin:
            tasks.append(asyncio.ensure_future(until_stdin_closes(stop, take)))
        await asyncio.wait((given, stopping, living), return_when=asyncio.FIRST_COMPLETED)
        if given.done() and not living.done():
            config = uvicorn.Config(
                create_app(policy, given.result()),
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=5,
            )
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            if ready is not None:
                ready(f"http://127.0.0.1:{policy.port}")
            await asyncio.wait((serving, stopping, living), return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            await serving
        if living.done():
            living.result()  # it ends by a bug only
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _listen(port: int) -> socket.socket:
    try:
        return loopback_listener(port)
    except OSError as e:
        raise ConfigError(f"Port {port} can't be used: {e.strerror}. Give another one, or 0 for any free one.") from e


def _need_libraries() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("tinker", "transformers", "starlette", "uvicorn") if find_spec(name) is None]:
        raise ConfigError(f"The policy server needs {', '.join(missing)}: pip install 'metaclaw-mitmproxy[rl]'.")


def quiet_sdk() -> None:
    """What fails here is told to nobody but the user: the SDK reports errors, with their texts, to its maker."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")  # noqa: TID251 - the SDK has no other switch
    logging.getLogger("tinker").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def main() -> None:
    os.umask(0o077)
    quiet_sdk()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    try:
        asyncio.run(serve(follow_stdin="--follow-stdin" in sys.argv[1:]))
    except MetaClawError as e:
        sys.exit(f"metaclaw policy: {e}")
    logging.shutdown()
    os._exit(0)  # all that matters is closed; the SDK would wait at the exit for a server that may have gone


if __name__ == "__main__":
    main()
