"""Saved weights: one safetensors file per checkpoint, replaced atomically.

Design: ``<root>/<run>/weights|sampler_weights/<name>.safetensors`` is ``tinker://<run>/<kind>/<name>``. The file
holds adapter, optimizer and, in its header, what they are, so there is no state in which half a checkpoint exists:
a reader sees the old file or the new one. The time to live is a small file beside it; if a crash separates the two,
the checkpoint lives longer, never shorter. Expired checkpoints are gone from the first look after their time.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from metaclaw_core.engine.errors import EngineError, NotFoundError
from metaclaw_core.engine.lora import LoraConfig
from metaclaw_core.settings import private_dir

KINDS = {"weights": "training", "sampler_weights": "sampler"}  # in the path → as the REST API calls it
SHORTEST_TTL = 3600
LONGEST_TTL = 10 * 366 * 86400
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:=-]{0,199}")
_PATH = re.compile(r"tinker://([^/]+)/([^/]+)/([^/]+)")


@dataclass(frozen=True)
class Place:
    run: str
    kind: str
    name: str

    @classmethod
    def parse(cls, path: str) -> Place:
        """Raises EngineError."""
        match = _PATH.fullmatch(path)
        if not match:
            raise EngineError(f"{path!r} is no checkpoint path; write tinker://RUN/weights|sampler_weights/NAME.")
        return cls(*match.groups()).checked()

    def checked(self) -> Place:
        if self.kind not in KINDS:
            raise EngineError(f"{self.kind!r} is no kind of checkpoint here; there are {' and '.join(KINDS)}.")
        for part in (self.run, self.name):
            if not _NAME.fullmatch(part):
                raise EngineError(f"{part!r} can't be a checkpoint's name: letters, digits and . _ : = - only, 200 at most.")
        return self

    @property
    def path(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True)
class About:
    """What a checkpoint is; written into its file."""

    base_model: str
    lora: LoraConfig
    created: float
    """Unix seconds."""
    has_optimizer: bool
    user_metadata: Mapping[str, str] | None = None

    @classmethod
    def from_json(cls, text: str) -> About:
        value: dict[str, Any] = json.loads(text)
        return cls(**{**value, "lora": LoraConfig(**value["lora"])})


@dataclass(frozen=True)
class Checkpoint:
    place: Place
    about: About
    size: int
    """Bytes."""
    expires: float | None
    """Unix seconds; None: never."""


class Checkpoints:
    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = private_dir(root)
        self._clock = clock

    def save(
        self, place: Place, about: About, tensors: Mapping[str, Tensor], *, ttl: int | None, overwrite: bool = False
    ) -> None:
        """Raises EngineError if the name is taken or the time to live is out of range."""
        place.checked()
        expires = self._expiry(ttl)
        file = self._file(place)
        self._expire(place)
        if file.exists() and not overwrite:
            raise EngineError(f"{place.path} exists already; save with overwrite=True or under another name.")
        private_dir(file.parent)
        part = file.with_suffix(f".part-{os.getpid()}")
        try:
            ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(ready, part, metadata={"metaclaw": json.dumps(asdict(about))})
            part.chmod(0o600)
            _sync(part)
            if expires is None:
                self._expires_file(place).unlink(missing_ok=True)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        if expires is not None:
            self._write_expiry(place, expires)
        _sync(file.parent)

    def get(self, place: Place) -> Checkpoint:
        """Raises NotFoundError."""
        self._expire(place)
        file = self._file(place)
        try:
            with safe_open(file, framework="pt") as opened:
                about = About.from_json(opened.metadata()["metaclaw"])
            return Checkpoint(place, about, file.stat().st_size, self._expires(place))
        except FileNotFoundError as e:
            raise NotFoundError(f"There is no checkpoint {place.path}, or it has expired.") from e
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
            raise EngineError(f"The checkpoint {place.path} can't be read: {e}") from e

    def load(self, place: Place, device: torch.device) -> tuple[Checkpoint, dict[str, Tensor]]:
        """Raises NotFoundError, EngineError."""
        checkpoint = self.get(place)
        return checkpoint, load_file(self._file(place), device=str(device))

    def find(self, run: str | None = None) -> list[Checkpoint]:
        """Newest first."""
        found = []
        for place in self._places(run):
            try:
                found.append(self.get(place))
            except EngineError:
                continue  # expired, or no file of ours
        return sorted(found, key=lambda c: -c.about.created)

    def delete(self, place: Place) -> None:
        """Raises NotFoundError."""
        self.get(place)
        self._file(place).unlink(missing_ok=True)
        self._expires_file(place).unlink(missing_ok=True)

    def set_ttl(self, place: Place, ttl: int | None) -> None:
        """Counted from now; None: never expires. Raises NotFoundError, EngineError."""
        self.get(place)
        expires = self._expiry(ttl)
        if expires is None:
            self._expires_file(place).unlink(missing_ok=True)
        else:
            self._write_expiry(place, expires)

    def _places(self, run: str | None) -> Iterator[Place]:
        for file in sorted(self.root.glob("*/*/*.safetensors")):
            place = Place(file.parent.parent.name, file.parent.name, file.name.removesuffix(".safetensors"))
            if place.kind in KINDS and run in (None, place.run):
                yield place

    def _file(self, place: Place) -> Path:
        return self.root / place.run / place.kind / f"{place.name}.safetensors"

    def _expires_file(self, place: Place) -> Path:
        return self.root / place.run / place.kind / f"{place.name}.expires"

    def _expires(self, place: Place) -> float | None:
        try:
            return float(self._expires_file(place).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _expire(self, place: Place) -> None:
        expires = self._expires(place)
        if expires is not None and expires <= self._clock():
            self._file(place).unlink(missing_ok=True)
            self._expires_file(place).unlink(missing_ok=True)

    def _expiry(self, ttl: int | None) -> float | None:
        if ttl is None:
            return None
        if not SHORTEST_TTL <= ttl <= LONGEST_TTL:
            raise EngineError(f"A time to live is from {SHORTEST_TTL} s to 10 years, not {ttl} s.")
        return self._clock() + ttl

    def _write_expiry(self, place: Place, expires: float) -> None:
        part = self._expires_file(place).with_suffix(f".expires-{os.getpid()}")
        part.write_text(str(expires))
        part.replace(self._expires_file(place))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
