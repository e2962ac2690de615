"""``metaclaw top``: what happens, in the terminal, once a second.

Design: the keyboard is read while waiting for the next frame, so `q` acts at once, and the terminal's own mode is put back
however this ends. What can't be read for a moment (a locked store, a proxy that just ended) is said in the frame; the next
one tries again.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import home, load_settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from metaclaw_core.store.rollouts import Store

_SECONDS = 1.0
_ONCE_HEIGHT = 60  # lines where nothing says how high the terminal is


@click.command("top")
@click.option("--once", is_flag=True, help="Print one frame and end.")
def command(once: bool) -> None:
    """Watch proxies, queues, sessions, requests, skills and the worker. `q` ends it."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    with _Source() as source:
        if once:
            console.print(source.frame(console.width, _ONCE_HEIGHT))
            return
        if not console.is_terminal:
            raise click.UsageError("This is no terminal: use --once.")
        with contextlib.suppress(KeyboardInterrupt):
            _watch(console, source)


def _watch(console: Any, source: _Source) -> None:
    from rich.live import Live

    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(source.frame(console.width, console.height), refresh=True)
            if pressed(_SECONDS) in ("q", "Q", "\x03", "\x04"):
                return


class _Source:
    """Where frames come from; the store is opened once there is one."""

    def __init__(self) -> None:
        self._store: Store | None = None

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._store is not None:
            self._store.close()

    def frame(self, width: int, height: int) -> RenderableType:
        from metaclaw_core.view.frame import frame, gather

        problems: list[str] = []
        seen = None
        try:
            if (store := self._opened()) is not None:
                problems += self._take_in(store)
                seen = gather(store)
        except MetaClawError as e:
            problems.append(str(e))
        return frame(_proxies(), seen, problems, width=width, height=height)

    def _opened(self) -> Store | None:
        from metaclaw_core.store.db import open_store

        url = load_settings().store.url
        if self._store is None and (url or (home() / "store.db").exists() or any((home() / "spool").glob("*.db"))):
            self._store = open_store(url or home() / "store.db")
        return self._store

    @staticmethod
    def _take_in(store: Store) -> tuple[str, ...]:
        from metaclaw_core.store.drain import drain_under_lease

        return drain_under_lease(store, home() / "spool").problems


def _proxies() -> list[dict[str, Any]]:
    from metaclaw_core.proxy.control import call, running_proxies

    answers = []
    for proxy in running_proxies(home()):
        try:
            answers.append({"pid": proxy.pid, **call(proxy, "status", timeout=_SECONDS)})
        except OSError as e:
            answers.append({"pid": proxy.pid, "error": f"does not answer: {e}"})
    return answers


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """``pressed(seconds)``: the key that was pressed in that time, or None. Where stdin is no terminal only time passes."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> None:
            time.sleep(seconds)

        yield wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> str | None:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 1).decode("ascii", "replace") or "\x04" if ready else None  # nothing to read: it was closed

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
