"""`retrieval_mode: embedding`: skills whose meaning is near, by vectors of an embedding model.

Design: the worker embeds the skills when it builds the index (`embed_index`; a skill whose content is known keeps
its vector) and the vectors travel in the index file. For a turn only the query is embedded: by an OpenAI-compatible
`/embeddings` endpoint, or by a local model in a child process, because torch must not enter the proxy. Either has a
deadline; when it passes, or the index has no vectors of this model, the turn is answered by TF-IDF and the reason
noted. After a failure the endpoint is left alone for `_REST` seconds, so that a dead one doesn't hold up every turn.

The query is the text of those turns that TF-IDF lets speak (`Index.spoken`). The cut-off is taken from the library
itself: a text that is not nearer to any skill than skills are to each other on average plus one standard deviation asks
for nothing.

Limits: measured on the project's data, a small general model ranks worse than TF-IDF; what this adds is matching
across languages. That cut-off has not been measured with any model.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metaclaw_core.addresses import ForbiddenAddress, forbidden_url, refuse_forbidden
from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.skills.index import Hit, Index, top
from metaclaw_core.skills.query import Query
from metaclaw_core.skills.retrieve import Options, Retrieval
from metaclaw_core.skills.skill import Skill
from metaclaw_core.skills.tokens import capped

if TYPE_CHECKING:
    import httpx

_REST = 30.0  # seconds
_BATCH = 64  # texts per call when skills are embedded
_BODY_CHARS = 1_000
_SAMPLE = 512  # skills whose mutual nearness makes the cut-off


class EmbeddingError(MetaClawError):
    """The model gave no usable vectors."""


class Embedder(Protocol):
    model: str

    async def embed(self, texts: Sequence[str], timeout: float) -> NDArray[np.float32]:  # noqa: ASYNC109  (part of the contract)
        """(texts, dimensions), rows of unit length. Raises `EmbeddingError`, also when `timeout` seconds are over."""
        ...

    async def aclose(self) -> None: ...


class HttpEmbedder:
    """An OpenAI-compatible endpoint, `url` being its base (".../v1"). The key goes there and nowhere else."""

    def __init__(
        self, url: str, model: str, api_key: str = "", *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        import httpx

        self.model = model
        self._url = url.rstrip("/") + "/embeddings"
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # trust_env=False: the environment's proxy may be ourselves.
        self._client = httpx.AsyncClient(headers=headers, transport=transport, trust_env=False)

    async def embed(self, texts: Sequence[str], timeout: float) -> NDArray[np.float32]:  # noqa: ASYNC109
        import httpx

        try:
            async with asyncio.timeout(timeout):
                body = {"model": self.model, "input": list(texts), "encoding_format": "float"}
                trace = {"trace": refuse_forbidden}
                response = await self._client.post(self._url, json=body, timeout=timeout, extensions=trace)
                response.raise_for_status()
                rows = sorted(response.json()["data"], key=lambda row: int(row["index"]))
                return unit_rows([row["embedding"] for row in rows], len(texts))
        except TimeoutError as e:
            raise EmbeddingError(f"{self._url} gave no vectors within {timeout:g} s.") from e
        except ForbiddenAddress as e:
            raise EmbeddingError(f"{self._url} gave no vectors: {e}") from e
        except httpx.HTTPError as e:
            raise EmbeddingError(f"{self._url} gave no vectors ({type(e).__name__}: {e}).") from e
        except (ValueError, KeyError, TypeError) as e:
            raise EmbeddingError(f"{self._url} answered with something else than vectors ({e!r}).") from e

    async def aclose(self) -> None:
        await self._client.aclose()


class ProcessEmbedder:
    """A local model in a child process that reads a JSON list of texts per line and answers with a list of vectors.

    The child is started by the first call, which therefore usually runs into its deadline; it ends with its stdin.
    """

    def __init__(self, model: str, command: Sequence[str] | None = None) -> None:
        self.model = model
        self._command = tuple(command or (sys.executable, "-m", "metaclaw_core.skills.embedding", model))
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._owed = 0  # answers that belong to questions whose deadline passed

    async def embed(self, texts: Sequence[str], timeout: float) -> NDArray[np.float32]:  # noqa: ASYNC109
        try:
            async with asyncio.timeout(timeout), self._turn:
                return await self._ask(texts)
        except TimeoutError as e:
            raise EmbeddingError(f"The local model {self.model} gave no vectors within {timeout:g} s.") from e
        except (OSError, ValueError, TypeError) as e:
            raise EmbeddingError(f"The local model {self.model} gave no vectors ({e!r}).") from e

    async def _ask(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._child is None or self._child.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            self._child = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=1 << 26)
            self._owed = 0
        child = self._child
        if child.stdin is None or child.stdout is None:
            raise OSError("the child has no pipes")
        child.stdin.write(json.dumps(list(texts)).encode() + b"\n")
        self._owed += 1
        await child.stdin.drain()
        while True:
            line = await child.stdout.readline()
            if not line:
                raise OSError(
                    f"it ended; is the extra installed? pip install 'metaclaw-mitmproxy[embed]' ({self._command[0]})"
                )
            self._owed -= 1
            if self._owed == 0:
                return unit_rows(json.loads(line), len(texts))

    async def aclose(self) -> None:
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            if child.stdin is not None:
                child.stdin.close()
            try:
                await asyncio.wait_for(child.wait(), 2)
            except TimeoutError:
                child.kill()
                await child.wait()


def unit_rows(rows: Any, expected: int) -> NDArray[np.float32]:
    """Rows scaled to length one. Raises ValueError where they aren't `expected` equally long rows of finite numbers."""
    array = np.asarray(rows, dtype=np.float32)
    if array.ndim != 2 or len(array) != expected or not array.shape[1] or not np.isfinite(array).all():
        raise ValueError(f"{expected} vectors were asked for, shape {array.shape} came")
    length = np.linalg.norm(array, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (array / np.where(length > 0, length, 1)).astype(np.float32)
    return scaled


def create_embedder(options: Options) -> Embedder:
    if not options.embedding_model:
        raise ConfigError("skills.retrieval_mode is 'embedding' but skills.embedding_model is not set.")
    if options.embedding_url:
        if (problem := forbidden_url(options.embedding_url)) is not None:
            raise ConfigError(f"skills.embedding_url = {options.embedding_url} is {problem}.")
        return HttpEmbedder(options.embedding_url, options.embedding_model, options.embedding_api_key)
    return ProcessEmbedder(options.embedding_model)


async def embed_index(index: Index, embedder: Embedder, *, known: Index | None = None, timeout: float = 60.0) -> Index:  # noqa: ASYNC109
    """`index` with a vector for every skill, or `index` itself if it has them all.

    `known` is an earlier index: a skill with the same content takes its vector from there. `timeout` is for one call.
    """
    state = index.state
    have: dict[bytes | memoryview, NDArray[np.float32]] = {}
    for source in (known.state if known is not None else None, state):
        if source is not None and source.vectors is not None and source.embedding_model == embedder.model:
            have |= {c: v for c, v in zip(source.contents, source.vectors, strict=True) if v.any()}
    missing = [i for i, content in enumerate(state.contents) if content not in have]
    if not state.names or (not missing and state.vectors is not None and state.embedding_model == embedder.model):
        return index
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        skills = [skill for i in batch if (skill := index.skill(state.names[i])) is not None]
        vectors = await embedder.embed([_text(skill) for skill in skills], timeout)
        have |= {state.contents[i]: vector for i, vector in zip(batch, vectors, strict=True)}
    rows = [have[content] for content in state.contents]
    if len({len(row) for row in rows}) != 1:  # the model behind the name has changed
        return await embed_index(Index(replace(state, vectors=None)), embedder, timeout=timeout)
    return Index(
        replace(state, generation=state.generation + 1, vectors=np.stack(rows), embedding_model=embedder.model)
    )


def _text(skill: Skill) -> str:
    return "\n".join((skill.name.replace("-", " "), skill.description, *skill.triggers, skill.body[:_BODY_CHARS]))


class Embedding:
    name = "embedding"

    def __init__(self, options: Options, embedder: Embedder | None = None) -> None:
        self._embedder = embedder or create_embedder(options)
        self._timeout = options.embedding_timeout
        self._rest_until = 0.0
        self._cutoff: tuple[NDArray[np.float32], float] | None = None  # for which vectors, and what

    async def retrieve(self, texts: Sequence[str], index: Index, k: int) -> Retrieval:
        query, state = Query.of(texts), index.state
        vectors = state.vectors
        if vectors is None or state.embedding_model != self._embedder.model:
            return self._tfidf(query, index, k, f"the index has no vectors of {self._embedder.model}")
        if time.monotonic() < self._rest_until:
            return self._tfidf(query, index, k, "the model failed a moment ago")
        text = capped("\n".join(turn for turn, _ in reversed(index.spoken(query))))
        try:
            vector = (await self._embedder.embed([text], self._timeout))[0]
        except EmbeddingError as e:
            self._rest_until = time.monotonic() + _REST
            return self._tfidf(query, index, k, str(e))
        if len(vector) != vectors.shape[1]:
            return self._tfidf(query, index, k, f"the index was made with another {self._embedder.model}")
        scores = vectors @ vector
        if float(scores.max(initial=0.0)) < self._least(vectors):
            return Retrieval((), self.name)
        return Retrieval(tuple(Hit(state.names[i], float(scores[i])) for i in top(scores, k)), self.name)

    def _tfidf(self, query: Query, index: Index, k: int, note: str) -> Retrieval:
        return Retrieval(tuple(index.search(query, k)), "tfidf", note)

    def _least(self, vectors: NDArray[np.float32]) -> float:
        if self._cutoff is None or self._cutoff[0] is not vectors:
            self._cutoff = (vectors, nearness(vectors))
        return self._cutoff[1]

    async def aclose(self) -> None:
        await self._embedder.aclose()


def nearness(vectors: NDArray[np.float32]) -> float:
    """Mean plus one standard deviation of the cosines between different skills; 0 where there are fewer than two."""
    sample = vectors[:: max(1, -(-len(vectors) // _SAMPLE))]
    if len(sample) < 2:
        return 0.0
    cosines = (sample @ sample.T)[~np.eye(len(sample), dtype=bool)]
    return float(cosines.mean() + cosines.std())


def _serve(model_name: str) -> None:
    """The child of `ProcessEmbedder`."""
    model = import_module("sentence_transformers").SentenceTransformer(model_name)
    for line in sys.stdin:
        vectors = model.encode(json.loads(line), normalize_embeddings=True)
        sys.stdout.write(json.dumps(vectors.tolist()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
