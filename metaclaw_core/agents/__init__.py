"""The registry of agent modules, and the one question they answer: whose request is this?

Design: an agent module is an entry point of the group ``metaclaw.agents`` whose name is the module's `name` and
whose object satisfies `agents.base.Agent`. The built-ins are declared the same way; the table below repeats
them for a checkout that is not installed. Other packages' modules are asked first (they know something more
special than we do), then the built-ins, `generic` last. A module of another package that can't be loaded is
reported and left out, for it must not take the proxy down.

Everything is loaded at the first use, not at import: an agent's own module imports this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from metaclaw_core import plugins
from metaclaw_core.agents.base import Agent, Identity, Prior
from metaclaw_core.model import Hints, Request

GROUP = "metaclaw.agents"
BUILT_IN = tuple(
    EntryPoint(name, f"metaclaw_core.agents.{name}:{name.upper()}", GROUP)
    for name in ("openclaw", "claude_code", "codex", "generic")
)

AGENTS: tuple[Agent, ...]  # = agents(), made by __getattr__


def load(found: Iterable[EntryPoint]) -> tuple[Agent, ...]:
    """The modules among `found` that have a name of their own, in their order, then the built-ins."""
    ours, theirs = plugins.load("agent", BUILT_IN, found)
    return (*theirs.values(), *ours.values())


@cache
def agents() -> tuple[Agent, ...]:
    return load(entry_points(group=GROUP))


def __getattr__(name: str) -> Any:
    if name == "AGENTS":
        return agents()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def identify(request: Request, hints: Hints, prior: Prior | None = None) -> Identity:
    """What the first module that recognises the request says of it; `generic` recognises all."""
    return next(agent.identify(request, hints, prior) for agent in agents() if agent.recognises(request, hints))
