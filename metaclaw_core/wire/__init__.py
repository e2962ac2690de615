"""The registry of wire dialects: the built-ins and those that other packages bring.

Design: a dialect is an entry point of the group ``metaclaw.dialects`` whose name is the dialect's
`name` and whose object satisfies `wire.base.Dialect`. The built-ins are declared the same way; the
table below repeats them for a checkout that is not installed, and gives them precedence: a name
belongs to the built-in, a path to the first dialect that claims it. A dialect of another package that
can't be loaded is reported and left out, for it must not take the proxy down.

Everything is loaded at the first use, not at import: a dialect's own module imports this package.
The proxy calls `dialects()` once when it starts, so that no request waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from metaclaw_core import plugins
from metaclaw_core.errors import WireError
from metaclaw_core.wire.base import Dialect, Route

GROUP = "metaclaw.dialects"
BUILT_IN = tuple(
    EntryPoint(name, f"metaclaw_core.wire.{name}:{name.upper()}", GROUP)
    for name in ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama")
)

DIALECTS: tuple[Dialect, ...]  # = dialects(), made by __getattr__


def load(found: Iterable[EntryPoint]) -> tuple[Dialect, ...]:
    """The built-ins, then the dialects among `found` that have a name of their own, in their order."""
    ours, theirs = plugins.load("dialect", BUILT_IN, found)
    return (*ours.values(), *theirs.values())


@cache
def dialects() -> tuple[Dialect, ...]:
    return load(entry_points(group=GROUP))


def __getattr__(name: str) -> Any:
    if name == "DIALECTS":
        return dialects()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_route(method: str, path: str) -> tuple[Dialect, Route] | None:
    """The dialect that a request speaks, told from method and path alone; None: not an LLM call."""
    for dialect in dialects():
        route = dialect.route(method, path)
        if route is not None:
            return dialect, route
    return None


def websocket_route(path: str) -> tuple[Dialect, Route] | None:
    """The same for a WebSocket upgrade (a GET): a path that answers POST as well has somewhere to fall back to.

    A protocol that exists on WebSockets only (OpenAI Realtime, Gemini Live) is therefore None.
    """
    return find_route("POST", path)


def by_name(name: str) -> Dialect:
    """Raises WireError for a name that is not registered (a stored one whose package is gone)."""
    for dialect in dialects():
        if dialect.name == name:
            return dialect
    raise WireError(f"dialect {name!r} is not known; install the package that provides it")
