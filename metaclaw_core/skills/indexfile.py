"""The index as one file: written by the worker, read by the proxy while it serves traffic.

Layout, little-endian:

    "METACLAW-SKILLS\\n"   16 bytes
    version                u32
    length of the header   u32
    header                 JSON: generation, names, sections {name: [offset, bytes]}, the fields' constants
    sections               arrays as they lie in memory, vocabularies, the skills' contents
    checksum               32 bytes, BLAKE2b of all before

No pickle, so a file can hold nothing but data. It is read as a whole and checked before any of it is used: a
mapped file would crash the proxy if somebody cut it short. A term's number is its place in the vocabulary.

The proxy reads in a thread, and the steps that hold the interpreter are cut into pieces of well under a
millisecond, because whoever holds it delays every streamed token.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaclaw_core.errors import MetaClawError
from metaclaw_core.skills.files import write_atomic
from metaclaw_core.skills.index import Field, Index, State

_MAGIC = b"METACLAW-SKILLS\n"
VERSION = 1  # also to be raised when terms or weights are made otherwise: old files are then built anew
_HEAD = struct.Struct("<II")
_DIGEST = 32
_PIECE = 2_048  # terms of a vocabulary decoded in one go
_PAUSE = 0.0002  # seconds after each piece; 0 is too short for the proxy's loop to wake up
_ALIGN = 64


class IndexDamaged(MetaClawError):
    """A file is no skill index, is of another version, or its bytes are not what was written."""


def save_index(index: Index, path: Path) -> None:
    """Replaces the file at `path` in one step, readable by its owner only."""
    state = index.state
    sections: list[tuple[str, bytes]] = []
    fields: dict[str, Any] = {}
    for name, field in (("head", state.head), ("body", state.body)):
        terms = list(field.vocabulary)  # insertion order is numbering only after a build: sort by number
        terms.sort(key=field.vocabulary.__getitem__)
        pieces = ["\n".join(terms[i : i + _PIECE]).encode() for i in range(0, len(terms), _PIECE)]
        fields[name] = {"mean_length": field.mean_length, "terms": len(terms), "pieces": [len(p) for p in pieces]}
        sections += [
            (f"{name}.vocabulary", b"".join(pieces)),
            (f"{name}.starts", field.starts.astype("<i8").tobytes()),
            (f"{name}.docs", field.docs.astype("<i4").tobytes()),
            (f"{name}.parts", field.parts.astype("<f4").tobytes()),
        ]
    ends = np.cumsum([len(c) for c in state.contents], dtype=np.int64) if state.contents else np.zeros(0, np.int64)
    sections += [("content.ends", ends.astype("<i8").tobytes()), ("content", b"".join(state.contents))]
    if state.vectors is not None:
        sections.append(("vectors", state.vectors.astype("<f4").tobytes()))

    places, offset = {}, 0
    for name, data in sections:
        places[name] = [offset, len(data)]
        offset += len(data) + -len(data) % _ALIGN
    header = json.dumps(
        {
            "generation": state.generation,
            "names": state.names,
            "categories": state.categories,
            "fields": fields,
            "telling": state.telling,
            "origin": state.origin,
            "embedding_model": state.embedding_model,
            "dimensions": 0 if state.vectors is None else state.vectors.shape[1],
            "sections": places,
        }
    ).encode()
    header += b" " * (-(len(_MAGIC) + _HEAD.size + len(header)) % _ALIGN)
    out = [_MAGIC, _HEAD.pack(VERSION, len(header)), header]
    for _, data in sections:
        out += [data, bytes(-len(data) % _ALIGN)]
    whole = b"".join(out)
    write_atomic(path, whole + hashlib.blake2b(whole, digest_size=_DIGEST).digest())


def load_index(path: Path) -> Index:
    """The index at `path`. Raises `IndexDamaged` on anything but a whole file of ours, `OSError` if there is none."""
    raw = path.read_bytes()
    whole = memoryview(raw)[:-_DIGEST]
    start = len(_MAGIC) + _HEAD.size
    if len(raw) < start + _DIGEST or not raw.startswith(_MAGIC):
        raise IndexDamaged(f"{path} is not a skill index, or only the beginning of one.")
    version, length = _HEAD.unpack_from(raw, len(_MAGIC))
    if version != VERSION:
        raise IndexDamaged(f"{path} is a skill index of version {version}; this program reads version {VERSION}.")
    if hashlib.blake2b(whole, digest_size=_DIGEST).digest() != raw[-_DIGEST:]:
        raise IndexDamaged(f"{path} is damaged: its checksum does not fit. Rebuild it with `metaclaw skills index`.")
    try:
        return _read(json.loads(raw[start : start + length]), whole[start + length :])
    # The checksum proves that this was written, not that its writer was one of ours.
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise IndexDamaged(f"{path} does not have the structure of a skill index ({e!r}).") from e


def read_origin(path: Path) -> str | None:
    """`State.origin` of the file at `path` without reading the rest; None: no file of ours, or not of this version."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC) + _HEAD.size)
            if len(start) < len(_MAGIC) + _HEAD.size or not start.startswith(_MAGIC):
                return None
            version, length = _HEAD.unpack_from(start, len(_MAGIC))
            return str(json.loads(file.read(length))["origin"]) if version == VERSION else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _read(header: dict[str, Any], data: memoryview) -> Index:
    def section(name: str) -> memoryview:
        offset, size = header["sections"][name]
        if offset < 0 or size < 0 or offset + size > len(data):
            raise ValueError(f"section {name} lies outside the file")
        return data[offset : offset + size]

    names = tuple(header["names"])
    ends = np.frombuffer(section("content.ends"), "<i8").tolist()
    contents = section("content")
    dimensions = header["dimensions"]
    state = State(
        generation=header["generation"],
        names=names,
        positions={name: i for i, name in enumerate(names)},
        categories=tuple(header["categories"]),
        contents=tuple(contents[a:b] for a, b in zip([0, *ends], ends, strict=False)),
        head=_read_field(header["fields"]["head"], "head", section, len(names)),
        body=_read_field(header["fields"]["body"], "body", section, len(names)),
        vectors=np.frombuffer(section("vectors"), "<f4").reshape(len(names), dimensions) if dimensions else None,
        embedding_model=header["embedding_model"],
        telling=float(header["telling"]),
        origin=header["origin"],
    )
    if not len(state.names) == len(state.positions) == len(state.contents) == len(state.categories):
        raise ValueError("names and contents differ in number")
    return Index(state)


def _read_field(constants: dict[str, Any], name: str, section: Callable[[str], memoryview], skills: int) -> Field:
    vocabulary: dict[str, int] = {}
    text, at = section(f"{name}.vocabulary"), 0
    for size in constants["pieces"]:
        terms = str(text[at : at + size], "utf-8").split("\n")
        vocabulary.update(zip(terms, range(len(vocabulary), len(vocabulary) + len(terms)), strict=True))
        at += size
        time.sleep(_PAUSE)
    starts: NDArray[np.int64] = np.frombuffer(section(f"{name}.starts"), "<i8").astype(np.int64)
    docs: NDArray[np.intp] = np.frombuffer(section(f"{name}.docs"), "<i4").astype(np.intp)
    parts: NDArray[np.float32] = np.frombuffer(section(f"{name}.parts"), "<f4").astype(np.float32)
    whole = len(vocabulary) == constants["terms"] == len(starts) - 1 and len(docs) == len(parts) == int(starts[-1])
    if not whole or (np.diff(starts) < 0).any() or (len(docs) and not 0 <= int(docs.min()) <= int(docs.max()) < skills):
        raise ValueError(f"the arrays of {name} do not fit each other")
    return Field(vocabulary, starts, docs, parts, constants["mean_length"])
