"""Builds the index: counting is scikit-learn's, so this is imported by the worker and never by the proxy.

Design: one `CountVectorizer` per field over our own tokens, the count parts in one vector expression, and the
matrix turned over to be term-major. Under a millisecond per skill, nearly all of it tokenising.

Candidates, archived and quarantined skills are not for injection and are left out here, so that no caller has
to remember it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import Settings, load_settings, skills_settings
from metaclaw_core.settings import home as default_home
from metaclaw_core.skills.content import encode
from metaclaw_core.skills.embedding import Embedder, EmbeddingError, create_embedder, embed_index
from metaclaw_core.skills.index import (
    BODY,
    EMPTY_FIELD,
    HEAD,
    Field,
    Index,
    Shape,
    State,
    body_terms,
    calibrated,
    head_terms,
)
from metaclaw_core.skills.indexfile import VERSION, IndexDamaged, load_index, read_origin, save_index
from metaclaw_core.skills.library import Library, open_library
from metaclaw_core.skills.patch import MARK
from metaclaw_core.skills.retrieve import Options
from metaclaw_core.skills.skill import Skill

INDEX_FILE = "skills.index"  # below METACLAW_HOME; the proxy watches it
_RETRY_SECONDS = 600  # after a failure of the embedding model


def build_index(skills: Iterable[Skill], *, generation: int = 1) -> Index:
    """An index of the retrievable ones among `skills`. Of several with one name the last counts."""
    chosen = list({skill.name: skill for skill in skills if skill.retrievable}.values())
    names = tuple(skill.name for skill in chosen)
    state = State(
        generation=generation,
        names=names,
        positions={name: i for i, name in enumerate(names)},
        contents=tuple(encode(skill) for skill in chosen),
        categories=tuple(skill.category for skill in chosen),
        head=_field([head_terms(skill) for skill in chosen], HEAD),
        body=_field([body_terms(skill) for skill in chosen], BODY),
    )
    return Index(calibrated(state))


async def publish(skills: Iterable[Skill], path: Path, *, origin: str = "", embedder: Embedder | None = None) -> Index:
    """Brings the index file up to date and returns what it now holds. An unchanged library leaves it alone.

    Embedding comes last: where it fails (`EmbeddingError`) the file is there without new vectors, and says so in
    its origin, so that `needs_build` asks for another try later. A file that was patched meanwhile knows of more than
    this build does: it is left as it is, and the next build begins with it.
    """
    file = _File(path)
    try:
        previous = await asyncio.to_thread(load_index, path)
    except (FileNotFoundError, IndexDamaged):
        previous = Index()
    index = await asyncio.to_thread(build_index, skills, generation=previous.generation + 1)
    patched = previous.state.origin.endswith(MARK)
    if previous.generation and previous.state.contents == index.state.contents and not patched:
        index = previous
    unfinished = origin if embedder is None else f"{origin}!{int(time.time())}"
    if index is not previous or (embedder is None and previous.state.origin != origin):
        index = Index(replace(index.state, origin=unfinished))
        if not await asyncio.to_thread(file.replace, index):
            return load_index(path)
    if embedder is not None:
        try:
            index = await embed_index(index, embedder, known=previous)
        except EmbeddingError:
            await asyncio.to_thread(file.replace, Index(replace(index.state, origin=unfinished)))
            raise
        if index.state.origin != origin:
            index = Index(replace(index.state, origin=origin))
            if not await asyncio.to_thread(file.replace, index):
                return load_index(path)
    return index


class _File:
    """The index file, replaced only while nobody else has replaced it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._identity()

    def replace(self, index: Index) -> bool:
        if self._identity() != self._seen:
            return False
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_index(index, self._path)
        self._seen = self._identity()
        return True

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size


def library_fingerprint(settings: Settings) -> str:
    """Changes when a skill file or a setting changes that the index depends on. One `stat` per skill."""
    return fingerprint(open_library(skills_settings(settings)), settings)


def fingerprint(library: Library, settings: Settings) -> str:
    """The same for an open library."""
    files = [(str(f), s.st_mtime_ns, s.st_size) for f in library.files() if (s := f.stat())]
    embed = settings.skills.retrieval_mode == "embedding"
    model = [settings.skills.embedding_url, settings.skills.embedding_model] if embed else []
    return hashlib.sha256(json.dumps([VERSION, files, model]).encode()).hexdigest()[:32]


def needs_build(home: Path, fingerprint: str) -> bool:
    """Whether the index below `home` was made from something else than what `fingerprint` stands for."""
    origin, _, failed_at = (read_origin(home / INDEX_FILE) or "").partition("!")
    return origin != fingerprint or (failed_at != "" and time.time() - int(failed_at) > _RETRY_SECONDS)


async def build_from_settings(settings: Settings, home: Path) -> tuple[Index, list[str]]:
    """Publishes the library that the settings describe; the index and what was wrong on the way."""
    origin = library_fingerprint(settings)  # before the scan: what changes meanwhile is built next time
    scan = open_library(skills_settings(settings)).scan()
    problems = [f"{p.path}: {p.reason}" for p in scan.problems]
    if settings.skills.retrieval_mode != "embedding":
        return await publish(scan.usable, home / INDEX_FILE, origin=origin), problems
    s = settings.skills
    options = Options(
        embedding_url=s.embedding_url, embedding_model=s.embedding_model, embedding_api_key=s.embedding_api_key
    )
    embedder = create_embedder(options)
    try:
        return await publish(scan.usable, home / INDEX_FILE, origin=origin, embedder=embedder), problems
    except EmbeddingError as e:
        return load_index(home / INDEX_FILE), [*problems, str(e)]
    finally:
        await embedder.aclose()


def main() -> None:
    """`python -m metaclaw_core.skills.build`: a process of its own, so that what scikit-learn needs is given back."""
    try:
        index, problems = asyncio.run(build_from_settings(load_settings(), default_home()))
    except MetaClawError as e:
        sys.exit(str(e))
    sys.stdout.write(json.dumps({"skills": len(index), "generation": index.generation, "problems": problems}) + "\n")


def _field(docs: list[list[str]], shape: Shape) -> Field:
    if not any(docs):  # CountVectorizer refuses an empty vocabulary
        return EMPTY_FIELD
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(analyzer=_as_it_is, dtype=np.float32)
    counts = vectorizer.fit_transform(docs).tocsr()
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    mean = float(lengths.mean())
    length = np.repeat(lengths, np.diff(counts.indptr))
    tf = counts.data
    counts.data = tf * (shape.k1 + 1) / (tf + shape.k1 * (1 - shape.b + shape.b * length / mean))
    by_term = counts.tocsc()
    return Field(
        vocabulary={term: int(at) for term, at in vectorizer.vocabulary_.items()},
        starts=by_term.indptr.astype(np.int64),
        docs=by_term.indices.astype(np.intp),
        parts=by_term.data.astype(np.float32),
        mean_length=mean,
    )


def _as_it_is(terms: list[str]) -> list[str]:
    return terms


if __name__ == "__main__":
    main()
