"""The lean proxy runs under ``python -O``: `metaclaw start` runs itself once more, in the same process.

Design: mitmproxy checks the type of each event of each layer where `__debug__` is set, for those who work on it, and that is a
seventh of what a request costs. What Python compiles for ``-O`` must be kept, or each start would take seconds. Where it can't
be kept beside the sources as ever (they belong to somebody else, or PYTHONDONTWRITEBYTECODE asks for clean folders) it is kept
in a folder of its own, in the environment or else in METACLAW_HOME: some 20 MB.

Limits: a user's own script (`--set scripts=…`) loses its asserts, too; `--no-lean` keeps them. ``python -B``, a system that
isn't POSIX and a mode that carries QUIC leave all as it is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from metaclaw_core.proxy.startoptions import only_tcp
from metaclaw_core.settings import home

_DONT_WRITE = "PYTHONDONTWRITEBYTECODE"
COMPILED = "metaclaw-compiled"


def optimise(sets: Iterable[str]) -> None:
    """This very command once more, under ``-O``; returns where that is done or can't be. `sets`: mitmproxy's options."""
    environment = dict(os.environ)  # noqa: TID251 - Python's own setting, for Python
    if sys.flags.optimize:
        if (sys.pycache_prefix or "").endswith(COMPILED):  # it was taken from this process, which writes there; not from its children
            os.environ.setdefault(_DONT_WRITE, "1")  # noqa: TID251
        return
    never = sys.flags.dont_write_bytecode and _DONT_WRITE not in environment
    if never or os.name != "posix" or not sys.executable or getattr(sys, "frozen", False):
        return
    if not only_tcp(sets):
        return
    kept = compiled_folder("mitmproxy", (environment_folder(), home()))
    if kept is not None:
        if kept:  # else what is there is read, and a folder that is to stay clean does
            environment.pop(_DONT_WRITE, None)
        if kept == environment_folder() / COMPILED:
            environment_folder().mkdir(exist_ok=True)  # others may use that one: it isn't ours alone
        os.umask(0o077)  # as the proxy would a moment later: what is compiled may lie in METACLAW_HOME
        flags = ["-O", *(["-X", f"pycache_prefix={kept}"] if kept else [])]
        os.execve(sys.executable, [sys.executable, *flags, *sys.orig_argv[1:]], environment)  # noqa: S606


def environment_folder() -> Path:
    return Path(sys.prefix) / "var"


def compiled_folder(package: str, elsewhere: Iterable[Path]) -> Path | str | None:
    """Where what ``-O`` compiles of `package` is kept: "" beside its sources, or a folder of ours in the first of `elsewhere` that
    is ours to write; None: nowhere."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return None
    beside = Path(importlib.util.cache_from_source(found.origin, optimization=1))
    if os.access(beside, os.R_OK) or (not sys.dont_write_bytecode and os.access(_existing(beside.parent), os.W_OK)):
        return ""
    return next((folder / COMPILED for folder in elsewhere if _ours(folder / COMPILED)), None)


def _ours(folder: Path) -> bool:
    """Can we write there, and nobody but us has? What lies there is run."""
    there = _existing(folder)
    return os.access(there, os.W_OK) and (there != folder or folder.stat().st_uid == os.getuid())


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))  # noqa: PTH112 - False where none may look
