"""Skills: the library on disk, the index that the proxy reads, and what fits a turn.

Names are loaded when first used, so that the proxy never imports scikit-learn and `metaclaw --help` not even numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaclaw_core.skills.build import build_index
    from metaclaw_core.skills.index import Hit, Index
    from metaclaw_core.skills.indexfile import load_index, save_index
    from metaclaw_core.skills.library import Library
    from metaclaw_core.skills.query import Query
    from metaclaw_core.skills.skill import Provenance, Skill, Status
    from metaclaw_core.skills.watch import IndexWatcher

__all__ = [
    "Hit",
    "Index",
    "IndexWatcher",
    "Library",
    "Provenance",
    "Query",
    "Skill",
    "Status",
    "build_index",
    "load_index",
    "save_index",
]

_HOME = {
    "Hit": "index",
    "Index": "index",
    "IndexWatcher": "watch",
    "Library": "library",
    "Provenance": "skill",
    "Query": "query",
    "Skill": "skill",
    "Status": "skill",
    "build_index": "build",
    "load_index": "indexfile",
    "save_index": "indexfile",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
