"""Text to token ids and back, exactly and only what is new.

Design: a tokenizer splits text at its added tokens before it does anything else, so the stretches between them can be
encoded one by one and remembered. `Encoder` keeps the ids of stretches seen before: of a prompt of 13,000 tokens of which
12,000 came in the last request, too, only the last 1,000 are encoded. Tokenizers for which that does not hold (they look
at what stands before, as those with a space in front of the first word do) are found by a test at the start and encode
the whole text each time.

`Detokenizer` gives the text of a growing list of ids: whatever the pieces, what it gives joins to what the tokenizer
makes of the whole. A character that is not complete is held back.

What a human, a web page or a tool writes must not end a message or open one of the system's. `Encoder.harmless` puts
`APART` into every text that spells a special token, and `encode` cuts there, so that it stays a text.

Limits: added tokens that take the white space beside them, or match in normalised text, stay inside their stretch.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

APART = "\ufdd0"  # not a character: Unicode leaves it to programs
_MAX_CHARS = 16_000_000  # of all stretches remembered
_UNDECIDED = "\ufffd"


class Encoder:
    """Ids of a text as ``tokenizer(text, add_special_tokens=False)`` has them. For one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer("", add_special_tokens=False)  # switches off truncation and padding that the tokenizer came with
        self._tokenizer = tokenizer
        self._known: OrderedDict[str, list[int]] = OrderedDict()
        self._chars = 0
        self._hard = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word) and token.content
        }
        self._split = re.compile(f"({_any_of(self._hard)})") if self._hard else None
        if self._split and not self._splits_well():
            self._split = None
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1}
        self._spelled = re.compile(_any_of({APART, *special}))
        self._hints = {APART, *(text[:2] for text in special)}

    def harmless(self, value: Any) -> Any:
        """A text, or JSON with texts in it, without special tokens: such a text has `APART` after its first character."""
        if isinstance(value, str):
            found = any(hint in value for hint in self._hints)  # far quicker than the expression, and mostly there is none
            return self._spelled.sub(_apart, value) if found else value
        if isinstance(value, dict):
            return {self.harmless(key): self.harmless(inner) for key, inner in value.items()}
        return [self.harmless(inner) for inner in value] if isinstance(value, list) else value

    def encode(self, text: str) -> list[int]:
        """Without `APART`; the text is cut there."""
        if APART not in text:
            return self._stretches(text)
        return [id for part in text.split(APART) for id in self._stretches(part)]

    def _stretches(self, text: str) -> list[int]:
        if self._split is None:
            return self._encode(text)
        ids: list[int] = []
        for i, piece in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._hard[piece])
            elif piece:
                ids += self._remembered(piece)
        return ids

    def is_boundary(self, text: str, at: int) -> bool:
        """Is what follows tokenised alike whatever stands before? True at the end and before an added token."""
        return at == len(text) or (self._split is not None and self._split.match(text, at) is not None)

    def _remembered(self, piece: str) -> list[int]:
        ids = self._known.get(piece)
        if ids is not None:
            self._known.move_to_end(piece)
            return ids
        ids = self._known[piece] = self._encode(piece)
        self._chars += len(piece)
        while self._chars > _MAX_CHARS and len(self._known) > 1:
            self._chars -= len(self._known.popitem(last=False)[0])
        return ids

    def _encode(self, text: str) -> list[int]:
        # Past the wrapper where there is one to pass: it is slower, and changes settings while another thread decodes.
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
            return ids
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _splits_well(self) -> bool:
        tokens = list(self._hard)
        pieces = ["system\nYou are.\n\n", " user\n", "1234 Grüße, 你好 🙂", "\n", "", "  two", "\n\n\tthree \n"]
        probe = "".join(f"{tokens[i % len(tokens)]}{piece}" for i, piece in enumerate(pieces * 2))
        whole: list[int] = self._tokenizer(probe, add_special_tokens=False)["input_ids"]
        return self.encode(probe) == whole


def _any_of(texts: Collection[str]) -> str:
    """An expression for the longest of these texts. Vocabularies reserve hundreds with the same beginning, so that is
    compared only once."""
    groups: dict[str, list[str]] = {}
    for text in sorted(texts, key=len, reverse=True):
        groups.setdefault(text[:4], []).append(re.escape(text[4:]))
    longest_first = sorted(groups.items(), key=lambda group: len(group[0]), reverse=True)
    return "|".join(f"{re.escape(start)}(?:{'|'.join(rests)})" for start, rests in longest_first)


def _apart(match: re.Match[str]) -> str:
    text = match[0]
    return _UNDECIDED if text == APART else text[0] + APART + text[1:]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The exact text, special tokens included."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class Detokenizer:
    """The text of a reply that grows by ids; special tokens among them are written out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last ids: what comes next may complete a character, or join with them
        self._given = 0  # characters of the window's text that were given

    def feed(self, ids: Sequence[int]) -> str:
        """What the new ids add to the text, as far as it is decided."""
        if not ids:
            return ""
        self._window += ids
        text = decode(self._tokenizer, self._window)
        complete = not text.endswith(_UNDECIDED)
        new = text[self._given :] if complete else text[self._given : -1]
        if complete:
            self._window = self._window[-1:]
            self._given = len(decode(self._tokenizer, self._window))
        else:
            self._given = max(self._given, len(text) - 1)
        return new

    def finish(self) -> str:
        """The rest: replacement characters for a character that never became complete."""
        text = decode(self._tokenizer, self._window)[self._given :] if self._window else ""
        self._window, self._given = [], 0
        return text
