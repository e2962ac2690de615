"""Chat completion chunks put together to the object that a JSON answer would have held.

Design: nothing is interpreted here beyond what joining needs, so that answer and stream are read by
the same code. Whatever can't be joined or read is skipped; `as_json` gives only what that code accepts.

Servers number their tool calls in different ways. A delta belongs to the call with its index, unless
it names another id and a function (some give every call index 0); without index, to the call with its
id; without both, to the last call, unless it names a function. An id or a name that comes again with
each delta counts once.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from metaclaw_core.errors import WireError
from metaclaw_core.model import ApiError, Json
from metaclaw_core.wire.base import rest
from metaclaw_core.wire.jsonio import dumps, loads
from metaclaw_core.wire.openai_common import REASONING, api_error, content_parts, inner, merge, thinking
from metaclaw_core.wire.sse import Event


class Chunks:
    def __init__(self) -> None:
        self.error: ApiError | None = None
        self._top: dict[str, Json] = {}
        self._choices: dict[int, _Choice] = {}
        self._done = False

    @property
    def complete(self) -> bool:
        """Every choice has told why it ended, or the server said that it is done."""
        choices = self._choices.values()
        return self._done or (bool(choices) and all(c.finish_reason is not None for c in choices))

    def as_json(self) -> dict[str, Json]:
        return {**self._top, "choices": [self._choices[i].as_json() for i in sorted(self._choices)]}

    def add(self, event: Event) -> None:
        if event.data.strip() == "[DONE]":
            self._done = True
            return
        try:
            chunk = loads(event.data, "chunk")
        except WireError:
            chunk = None
        failed = event.event == "error" or (isinstance(chunk, dict) and bool(chunk.get("error")))
        if failed and self.error is None:
            named = chunk.get("error") if isinstance(chunk, dict) else None
            self.error = api_error(named or chunk or event.data, chunk)
        if isinstance(chunk, dict) and event.event != "error":
            self._chunk(chunk)

    def _chunk(self, chunk: dict[str, Json]) -> None:
        for key in ("id", "model"):
            if isinstance(chunk.get(key), str) and chunk[key]:
                self._top.setdefault(key, chunk[key])
        if isinstance(chunk.get("usage"), dict):
            self._top["usage"] = chunk["usage"]
        merge(self._top, rest(chunk, ("id", "model", "object", "choices", "usage", "error")))
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = choice.get("index")
                index = index if type(index) is int else 0
                self._choices.setdefault(index, _Choice(index)).feed(choice)


class _Choice:
    """One choice of a stream; ends as the object that a JSON answer would hold."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self._texts: dict[str, list[str]] = {}  # by field: content, refusal, reasoning_content …
        self._parts: list[dict[str, Json]] = []  # content that is no text
        self._details: list[dict[str, Any]] = []  # OpenRouter's reasoning_details
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._legacy: _Call | None = None
        self._more: dict[str, Json] = {}  # unknown fields of the message
        self._outer: dict[str, Json] = {}  # unknown fields of the choice

    def feed(self, choice: dict[str, Json]) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = reason
        merge(self._outer, rest(choice, ("index", "delta", "message", "finish_reason")))
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice.get("message")  # a server that streams its whole answer as one chunk
        if isinstance(delta, dict):
            self._delta(delta)

    def _delta(self, delta: dict[str, Json]) -> None:
        for key, value in delta.items():
            if key == "role":
                continue
            if key in ("content", "refusal") or key in REASONING:
                self._text(key, value)
            elif key == "reasoning_details":
                self._detail(value)
            elif key == "tool_calls":
                for call in value if isinstance(value, list) else ():
                    if isinstance(call, dict):
                        self._call(call)
            elif key == "function_call":
                if isinstance(value, dict):
                    self._legacy = self._legacy or _Call()
                    self._legacy.add({"function": value})
            else:
                merge(self._more, {key: value})

    def _text(self, key: str, value: Json) -> None:
        if isinstance(value, str):
            if value:
                self._texts.setdefault(key, []).append(value)
        elif key == "content" and isinstance(value, list):  # Mistral
            for part in value:
                if not isinstance(part, dict):
                    continue
                if part.get("type") == "thinking":
                    self._text("reasoning_content", thinking(part.get("thinking")))
                elif part.get("type") == "text":
                    self._text("content", part.get("text"))
                else:
                    with suppress(WireError):  # a part that can't be read is not kept
                        if any(content_parts([part], "content")):
                            self._parts.append(part)

    def _detail(self, value: Json) -> None:
        """Pieces of one detail share type and index; their texts are to be joined, the rest is said once."""
        for piece in value if isinstance(value, list) else ():
            if not isinstance(piece, dict):
                continue
            last = self._details[-1] if self._details else None
            if last is None or _scalars(last) != _scalars(piece):
                self._details.append(dict(piece))
                continue
            for key, new in piece.items():
                if key in ("text", "summary", "data") and isinstance(new, str) and isinstance(last.get(key), str):
                    last[key] += new
                elif new is not None:
                    last[key] = new

    def _call(self, delta: dict[str, Json]) -> None:
        raw_index, id, name = delta.get("index"), delta.get("id"), _name(delta)
        index = raw_index if type(raw_index) is int else None
        id = id if isinstance(id, str) and id else None
        call: _Call | None
        if index is not None:
            call = self._by_index.get(index)
            if call is not None and id and call.id and id != call.id and name:
                call = None  # every call of this server has index 0
        elif id:
            call = next((c for c in self._calls if c.id == id), None)
        else:
            call = self._calls[-1] if self._calls and not name else None
        if call is None:
            call = _Call()
            self._calls.append(call)
        if index is not None:
            self._by_index[index] = call
        call.add(delta)

    def as_json(self) -> dict[str, Json]:
        message: dict[str, Json] = {
            "role": "assistant",
            **{k: "".join(v) for k, v in self._texts.items()},
            **self._more,
        }
        if self._parts:
            text = message.get("content")
            message["content"] = [*([{"type": "text", "text": text}] if text else []), *self._parts]
        if self._details:
            message["reasoning_details"] = self._details
        # A call that was cut before its name is no call yet.
        if calls := [c.as_json() for c in self._calls if c.name]:
            message["tool_calls"] = calls
        if self._legacy is not None and self._legacy.name:
            message["function_call"] = self._legacy.as_json()["function"]
        return {"index": self.index, "message": message, "finish_reason": self.finish_reason, **self._outer}


def _scalars(detail: dict[str, Json]) -> list[str | int]:
    return [v for k in ("type", "index") if isinstance(v := detail.get(k), str | int)]


def _name(delta: dict[str, Json]) -> str:
    name = inner(delta, "function").get("name") or inner(delta, "custom").get("name")
    return name if isinstance(name, str) else ""


class _Call:
    def __init__(self) -> None:
        self.id: str | None = None
        self.name = ""
        self._type = "function"
        self._arguments: list[str] = []
        self._inner: dict[str, Json] = {}
        self._outer: dict[str, Json] = {}

    def add(self, delta: dict[str, Json]) -> None:
        if isinstance(delta.get("id"), str) and delta["id"]:
            self.id = self.id or delta["id"]
        if isinstance(delta.get("type"), str) and delta["type"]:
            self._type = delta["type"]
        kind, key = self._kind()
        body = inner(delta, kind)
        name, piece = _name(delta), body.get(key)
        if name != self.name:  # else it came again
            self.name += name
        if isinstance(piece, str):
            self._arguments.append(piece)
        elif isinstance(piece, dict):
            self._arguments.append(dumps(piece))
        merge(self._inner, rest(body, ("name", key)))
        merge(self._outer, rest(delta, ("id", "index", "type", "function", "custom")))

    def _kind(self) -> tuple[str, str]:
        return ("custom", "input") if self._type == "custom" else ("function", "arguments")

    def as_json(self) -> dict[str, Json]:
        kind, key = self._kind()
        body = {**self._inner, "name": self.name, key: "".join(self._arguments)}
        return {"id": self.id, "type": self._type, kind: body, **self._outer}
