"""The ways to find skills for a turn, behind one protocol, and how a way is chosen by name.

Design: `retrieval_mode` names an entry point of the group `metaclaw.retrievers`, a factory that takes `Options`.
The three that ship are entry points like a stranger's; where the package is not installed (a checkout run with
`mitmdump -s`) they are made from the table below.

A retriever is handed the index of the moment with every call and keeps no state of the library. It may wait
(a query vector comes over the network), so it is a coroutine; the default never does. It must not raise for
anything the network or the user's text does: what it can't do it leaves to plain TF-IDF and says so in `note`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from metaclaw_core.errors import ConfigError
from metaclaw_core.skills.index import Hit, Index
from metaclaw_core.skills.query import Query

GROUP = "metaclaw.retrievers"
_SHIPPED = {
    "tfidf": "metaclaw_core.skills.retrieve:Tfidf",
    "template": "metaclaw_core.skills.template:Template",
    "embedding": "metaclaw_core.skills.embedding:Embedding",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the settings say to a retriever; each takes what it needs."""

    task_specific_top_k: int = 10
    embedding_url: str = ""  # OpenAI-compatible base, with its /v1; "": `embedding_model` is a local one
    embedding_model: str = ""
    embedding_api_key: str = ""
    embedding_timeout: float = 0.3  # seconds a turn may wait for its query vector


@dataclass(frozen=True, slots=True)
class Retrieval:
    hits: tuple[Hit, ...]  # best first; empty: inject nothing
    mode: str  # that found them: after a fall-back not the retriever's own name
    note: str | None = None  # why it fell back


class Retriever(Protocol):
    """One that never waits may say so with an attribute `waits` that is False; then no clock runs beside it."""

    name: str

    async def retrieve(self, texts: Sequence[str], index: Index, k: int) -> Retrieval:
        """The skills for the human turns `texts`, oldest first."""
        ...

    async def aclose(self) -> None: ...


class Tfidf:
    """TF-IDF with BM25's saturation over two fields; see `index`."""

    name = "tfidf"
    waits = False

    def __init__(self, options: Options) -> None:
        pass

    async def retrieve(self, texts: Sequence[str], index: Index, k: int) -> Retrieval:
        return Retrieval(tuple(index.search(Query.of(texts), k)), self.name)

    async def aclose(self) -> None:
        pass


def create_retriever(mode: str, options: Options | None = None) -> Retriever:
    """The retriever named `mode`. Raises `ConfigError` with the names there are."""
    points = {name: EntryPoint(name, value, GROUP) for name, value in _SHIPPED.items()}
    points |= {point.name: point for point in entry_points(group=GROUP)}
    if mode not in points:
        raise ConfigError(f"skills.retrieval_mode is {mode!r}; there are {', '.join(sorted(points))}.")
    factory = points[mode].load()
    return cast(Retriever, factory(options or Options()))
