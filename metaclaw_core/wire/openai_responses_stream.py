"""Events of a Responses stream, gathered to the items that the final `output` would have held.

Design: an item is built from its deltas until its own `output_item.done` replaces it, so a cut stream
gives finished items whole and the last one as far as it came. Nothing is interpreted: the items are
read by the code that reads a JSON answer. Events are matched by `output_index`, else by item id.

Limits: annotations and the progress of provider-executed calls are taken from finished items only.
"""

from __future__ import annotations

from dataclasses import dataclass

from metaclaw_core.model import ApiError, Json
from metaclaw_core.wire.fields import stream_object
from metaclaw_core.wire.openai_common import api_error
from metaclaw_core.wire.sse import Event

_TERMINAL = ("response.completed", "response.incomplete", "response.failed", "response.cancelled", "response.done")


@dataclass(frozen=True, slots=True)
class _Field:
    """Where the deltas of one event type go."""

    item: str  # type of the item, should its own event be missing
    key: str  # of the item's list of parts, or of the item's string
    part: str = ""  # type of the part; "": the item's string
    at: str = ""  # the event's field with the part's index
    text: str = ""  # the part's field


_FIELDS = {
    "output_text": _Field("message", "content", "output_text", "content_index", "text"),
    "refusal": _Field("message", "content", "refusal", "content_index", "refusal"),
    "reasoning_text": _Field("reasoning", "content", "reasoning_text", "content_index", "text"),
    "reasoning_summary_text": _Field("reasoning", "summary", "summary_text", "summary_index", "text"),
    "function_call_arguments": _Field("function_call", "arguments"),
    "custom_tool_call_input": _Field("custom_tool_call", "input"),
}


class Events:
    """`head`: the newest response object; `terminal`: it is the last one; `error`: of an error event."""

    def __init__(self) -> None:
        self.head: dict[str, Json] = {}
        self.terminal = False
        self.error: ApiError | None = None
        self._items: dict[int, _Item] = {}
        self._index_by_id: dict[str, int] = {}
        self._last = 0

    def items(self) -> list[dict[str, Json]]:
        return [self._items[index].as_json() for index in sorted(self._items)]

    def add(self, event: Event) -> None:
        data = stream_object(event.data)
        if data is None:
            return
        kind = data.get("type")
        if not isinstance(kind, str):
            kind = event.event
        response = data.get("response")
        if kind == "error":
            self.error = self.error or api_error(data.get("error") or data, data)
        elif isinstance(response, dict):
            if not self.terminal:  # the first terminal event is the last word
                self.head |= {k: v for k, v in response.items() if _usable(k, v)}
                self.terminal = kind in _TERMINAL
        elif kind.startswith("response."):
            self._item_event(kind.removeprefix("response."), data)

    def _item_event(self, kind: str, data: dict[str, Json]) -> None:
        item = data.get("item")
        if kind in ("output_item.added", "output_item.done"):
            if isinstance(item, dict):
                done = kind == "output_item.done"
                index = self._index(data, item.get("id"), new=not done)
                self._items.setdefault(index, _Item()).set(item, done=done)
        elif (field := _FIELDS.get(kind.rpartition(".")[0])) is not None:
            index = self._index(data, data.get("item_id"), new=False)
            self._items.setdefault(index, _Item(field.item)).add(field, data)

    def _index(self, data: dict[str, Json], id: Json, *, new: bool) -> int:
        index = data.get("output_index")
        if type(index) is not int:
            known = self._index_by_id.get(id) if isinstance(id, str) else None
            index = known if known is not None else self._last + 1 if new and self._items else self._last
        if isinstance(id, str):
            self._index_by_id[id] = index
        self._last = index
        return index


def _usable(key: str, value: Json) -> bool:
    """Of the right type, where the reader of answers insists on one."""
    if key in ("id", "model", "status"):
        return isinstance(value, str)
    return isinstance(value, dict) if key == "usage" else True


class _Item:
    """One output item as far as it has come."""

    def __init__(self, kind: str = "") -> None:
        self._raw: dict[str, Json] = {"type": kind, **({"role": "assistant"} if kind == "message" else {})}
        self._done = False
        self._texts: dict[tuple[str, int], tuple[_Field, list[str]]] = {}

    def set(self, item: dict[str, Json], *, done: bool) -> None:
        if not self._done:
            self._raw, self._done = item, done

    def add(self, field: _Field, data: dict[str, Json]) -> None:
        at = data.get(field.at)
        _, texts = self._texts.setdefault((field.key, at if type(at) is int else 0), (field, []))
        delta, whole = data.get("delta"), data.get(field.text or field.key)
        if isinstance(delta, str):
            texts.append(delta)
        elif isinstance(whole, str):  # the .done event repeats the text
            texts[:] = [whole]
        if isinstance(data.get("name"), str):
            self._raw = {"name": data["name"], **self._raw}

    def as_json(self) -> dict[str, Json]:
        if self._done:
            return self._raw
        item = dict(self._raw)
        lists: dict[str, list[Json]] = {}
        for (key, _), (field, texts) in sorted(self._texts.items(), key=lambda entry: entry[0]):
            text = "".join(texts)
            if field.part:
                lists.setdefault(key, []).append({"type": field.part, field.text: text})
            else:
                item[key] = text
        return {**item, **lists}
