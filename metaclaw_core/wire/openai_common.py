"""What both OpenAI dialects share: lists of objects, text parts, tool results, errors, stream leftovers.

Design: `objects` and `fields.optional` are the only ways in which the two modules touch a field whose
type matters, so a wrong type is a `WireError` that names the place, and never a TypeError three calls
later. What only informs (usage details) is read with `inner`, which takes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from metaclaw_core.errors import WireError
from metaclaw_core.model import ApiError, Json, Opaque, Part, Reasoning, Text
from metaclaw_core.wire.base import rest
from metaclaw_core.wire.fields import MAX_ERROR_MESSAGE, optional, plain_error
from metaclaw_core.wire.jsonio import loads


def objects(value: Json, where: str) -> Iterator[tuple[dict[str, Json], str]]:
    """The elements of a list of objects, each with its place; nothing for null."""
    if value is None:
        return
    if not isinstance(value, list):
        raise WireError(f"{where} is {type(value).__name__}, not a list")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise WireError(f"{where}[{i}] is {type(item).__name__}, not an object")
        yield item, f"{where}[{i}]"


REASONING = ("reasoning_content", "reasoning", "reasoning_text")  # where servers put it in a chat message
TEXT_TYPES = frozenset(("text", "input_text", "output_text"))


def text_part(part: Mapping[str, Json], where: str) -> Text | None:
    """A text or refusal part; None for any other type.

    A refusal is what the human got to read, so it is text, told apart by its type. An empty list
    (`annotations: []`) says nothing and is left out: a client that sends the part back may drop it.
    """
    kind = optional(part, "type", str, where)
    if kind in TEXT_TYPES:
        return Text(optional(part, "text", str, where) or "", _said(part, ("type", "text")))
    if kind == "refusal":
        return refusal(optional(part, "refusal", str, where) or "", _said(part, ("type", "refusal")))
    return None


def _said(part: Mapping[str, Json], known: tuple[str, ...]) -> dict[str, Json]:
    return {k: v for k, v in part.items() if k not in known and v is not None and v != []}


def refusal(text: str, extra: Mapping[str, Json] | None = None) -> Text:
    return Text(text, {"type": "refusal", **(extra or {})})


def content_parts(content: Json, where: str) -> Iterator[Part]:
    if isinstance(content, str):
        if content:
            yield Text(content)
        return
    for part, at in objects(content, where):
        text = text_part(part, at)
        if text is not None:
            yield text
        elif part.get("type") == "thinking":
            yield Reasoning(thinking(part.get("thinking")), opaque=rest(part, ("type", "thinking", "closed")) or None)
        else:
            yield Opaque(optional(part, "type", str, at) or "", part)


def thinking(value: Json) -> str:
    """Mistral: a string, or a list of text parts."""
    if isinstance(value, list):
        return "".join(t for part in value if isinstance(part, dict) and isinstance(t := part.get("text"), str))
    return value if isinstance(value, str) else ""


def result_text(content: Json, where: str) -> tuple[str, list[Json]]:
    """A tool result as text, and the blocks that are more than text, as they were."""
    if content is None or isinstance(content, str):
        return content or "", []
    texts, blocks = [], []
    for part, at in objects(content, where):
        text = text_part(part, at)
        if text is not None:
            texts.append(text.text)
        if text is None or text.extra:
            blocks.append(part)
    return "\n".join(texts), blocks


def inner(obj: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    """An object inside an object, or an empty one: for fields that only inform."""
    value = obj.get(key)
    return value if isinstance(value, dict) else {}


def api_error(value: Json, raw: Json) -> ApiError:
    """`value` is what stood under "error": OpenAI's object, or the bare sentence that some servers send."""
    if isinstance(value, dict):
        message = next((m for k in ("message", "detail", "error") if isinstance(m := value.get(k), str)), "")
        kind, code = value.get("type"), value.get("code")
        return ApiError(
            message[:MAX_ERROR_MESSAGE],
            type=kind if isinstance(kind, str) else None,
            code=str(code) if isinstance(code, str | int) and not isinstance(code, bool) else None,
            raw=raw,
        )
    return ApiError(value[:MAX_ERROR_MESSAGE] if isinstance(value, str) else "", raw=raw)


def parse_error(body: bytes) -> ApiError:
    """The error of an answer with status >= 400, whoever wrote it: the API, a gateway, a web server."""
    try:
        raw = loads(body, "error body")
    except WireError:
        return plain_error(body)
    value = raw[0] if isinstance(raw, list) and raw else raw  # Gemini's OpenAI endpoint wraps it in a list
    if isinstance(value, dict) and value.get("error") is not None:
        value = value["error"]
    error = api_error(value, raw)
    return error if error.message else replace(error, message=plain_error(body).message)


def merge(into: dict[str, Json], new: Mapping[str, Json]) -> None:
    """Gather fields of a stream that we don't interpret: lists grow, objects are updated, else the last word that isn't null wins.

    One level deep, so that `logprobs.content` grows too and no nesting can exhaust the stack.
    `into` holds copies of the lists and objects, never those of `new`.
    """
    for key, value in new.items():
        old = into.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            for name, more in value.items():
                _grow(old, name, more)
        elif isinstance(value, dict):
            into[key] = {k: [*v] if isinstance(v, list) else v for k, v in value.items()}
        else:
            _grow(into, key, value)


def _grow(into: dict[str, Json], key: str, value: Json) -> None:
    old = into.get(key)
    if value is None:
        into.setdefault(key, None)
    elif not isinstance(value, list):
        into[key] = value
    elif isinstance(old, list):
        old += value
    else:
        into[key] = [*value]
