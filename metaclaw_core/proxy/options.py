"""mitmproxy options for our settings: ``--set metaclaw_top_k=3`` is ``skills.top_k: 3``.

Design: every key of the settings model is an option named ``metaclaw_`` and its path joined with
``_``; the keys of ``skills`` and ``proxy`` that people change most have a short name too. Options
are optional strings without a default, so that an option that was not set leaves the value of the
configuration file alone; the settings model does the typing. mitmproxy has no float options anyway.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

from mitmproxy.addonmanager import Loader
from mitmproxy.options import Options

from metaclaw_core.settings import leaves, typed

logger = logging.getLogger(__name__)

PREFIX = "metaclaw_"
_SHORT = {
    "top_k": ("skills", "top_k"),
    "max_injected_tokens": ("skills", "max_injected_tokens"),
    "retrieval_mode": ("skills", "retrieval_mode"),
    "hosts": ("proxy", "hosts"),
    "websocket": ("proxy", "websocket"),
    "redact_dumps": ("proxy", "redact_dumps"),
}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    **{PREFIX + "_".join(path): path for path in leaves()},
    **{PREFIX + name: path for name, path in _SHORT.items()},
}


def register(loader: Loader) -> None:
    for name, path in OPTIONS.items():
        text = f"{'.'.join(path)} of the MetaClaw settings, as YAML; unset: the configuration file's."
        loader.add_option(name, str | None, None, text)  # type: ignore[arg-type]


def layer(options: Options) -> dict[str, Any]:
    """The nested settings that were given as options. Raises nothing: bad values are the model's business."""
    values: dict[str, Any] = {}
    for name, path in OPTIONS.items():
        raw = getattr(options, name, None)
        if raw is None:
            continue
        node = values
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = typed(path, raw)
    return values




def environment(options: Options) -> dict[str, str]:
    """The same as variables for a child process, which reads them where it reads the user's."""
    given = {path: raw for name, path in OPTIONS.items() if (raw := getattr(options, name, None)) is not None}
    return {f"METACLAW_{'_'.join(path).upper()}": raw for path, raw in given.items()}


def prepare_routing(options: Options) -> None:
    """In rl mode: no connection to an upstream that isn't asked, and HTTP/1 on both sides, since mitmproxy opens a new
    connection to an HTTP/1 server for each request of an HTTP/2 client. Where the user has chosen otherwise it stays so."""
    wanted: dict[str, Any] = {"connection_strategy": "lazy", "http2": False}
    ours = {name: value for name, value in wanted.items() if not options.has_changed(name)}
    if ours:
        options.update(**ours)
        logger.info("metaclaw: mode rl sets %s.", ", ".join(f"{name}={str(value).lower()}" for name, value in ours.items()))


def unknown(options: Options) -> list[str]:
    """A sentence for each option that was given with our prefix and is none of ours."""
    sentences = []
    for name, value in options.deferred.items():
        if name.startswith(PREFIX):
            close = difflib.get_close_matches(name.removeprefix(PREFIX), [n.removeprefix(PREFIX) for n in OPTIONS], n=1)
            given = " ".join(getattr(value, "val", [value]))
            hint = f"Did you mean {PREFIX}{close[0]}?" if close else f"There are {', '.join(sorted(OPTIONS))}."
            sentences.append(f"{name}={given} is not a known option. {hint}")
    return sentences
