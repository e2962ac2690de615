"""What other packages bring by entry points, beside what is built in.

Design: an extension is an entry point whose name is the `name` of the object it stands for. The built-ins are
declared the same way; a table of them serves a checkout that is not installed, and gives them precedence over a
stranger of the same name. What another package brings and can't be loaded is reported and left out, for it must not
take the proxy down; a built-in that can't be loaded is our own fault and raises.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint
from typing import Any

_log = logging.getLogger(__name__)


def load(what: str, built_in: Sequence[EntryPoint], found: Iterable[EntryPoint]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The built-ins by name, and those among `found` that have a name of their own, both in their order.

    `what` names the kind in the log ("dialect").
    """
    own = {point.name: point.value for point in built_in}
    ours = {point.name: point.load() for point in built_in}
    theirs: dict[str, Any] = {}
    for point in found:
        if own.get(point.name) == point.value:
            continue  # a built-in, declared by our own distribution
        if point.name in ours or point.name in theirs:
            _log.warning("%s %s (%s) is ignored: the name is taken", what, point.name, point.value)
            continue
        try:
            loaded = point.load()
        except Exception:  # noqa: BLE001 - the boundary to code that is not ours
            _log.exception("%s %s (%s) can't be loaded and is ignored", what, point.name, point.value)
            continue
        if getattr(loaded, "name", None) != point.name:
            _log.warning("%s %s (%s) is ignored: it does not call itself so", what, point.name, point.value)
            continue
        theirs[point.name] = loaded
    return ours, theirs
