"""How families of models write reasoning and tool calls: which marks there are, and what stands between them.

Design: a family is a value. All but one put reasoning between ``<think>`` tags at the start and calls between two marks;
what is between is read by a function that gives calls or None, and None means malformed. The last, harmony (gpt-oss),
is made of messages with headers and has a reader of its own (``parse.Harmony``). The family is told by what the chat
template writes, not by the model's name: fine-tunes keep the name and change the template.

Arguments stay the text that the model wrote, where it wrote JSON. The forms that write each argument as a tag of its own
(Qwen-Coder, GLM) don't say whether ``5`` is a number: the tool's declared schema does, and without one it is what JSON
makes of it.

Limits: DeepSeek's DSML (V3.2) and Mistral's form are not known; a model that writes them answers in text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from metaclaw_core.model import Json

type Schemas = Mapping[str, Mapping[str, Json]]  # of the declared tools' parameters, by the tool's name


@dataclass(frozen=True, slots=True)
class Written:
    """A call as the model wrote it. `id`: its own, where the form has one."""

    name: str
    arguments: str
    id: str | None = None


type Read = Callable[[str, Schemas], list[Written] | None]


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    open: str  # mark before calls
    close: str | None  # and after; None: they go on to the end of the reply
    read: Read
    marks: tuple[str, ...] = ()  # special tokens that mean something in a reply; others are not shown
    ends: tuple[str, ...] = ()  # tokens that end a reply, where the vocabulary has them
    bare: bool = False  # a reply that is a JSON object may be a call, too


# --- what stands between the marks ---------------------------------------------------------------


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_SPACE = " \t\n\r"


def members(text: str, at: int = 0) -> tuple[dict[str, str], int] | None:
    """The members of the JSON object at `at`, each value as its text, and where the object ends. None: it is none."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    found: dict[str, str] = {}
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # the colon
        start, (_, at) = at, _DECODER.raw_decode(text, at)
        found[key] = text[start:at]
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found, end


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _is_object(raw: str) -> bool:
    found = members(raw)
    return found is not None and not raw[found[1] :].strip()


def _json_call(found: Mapping[str, str], *, bare: bool = False) -> Written | None:
    """``{"name": …, "arguments" or "parameters": {…}}``; a text that holds the object is taken for the object."""
    name = json.loads(found.get("name", "null"))
    arguments = found.get("arguments", found.get("parameters"))
    if arguments is None:
        arguments = None if bare else "{}"
    elif arguments.startswith('"'):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or arguments is None or not _is_object(arguments):
        return None
    return Written(name, arguments)


def _hermes(body: str, schemas: Schemas) -> list[Written] | None:
    body = body.strip()
    if body.startswith("<function="):
        call = _coder(body, schemas)
    elif "<arg_key>" in body:
        call = _glm(body, schemas)
    else:
        found = members(body)
        call = _json_call(found[0]) if found and found[1] == len(body) else None
        if call is None and re.fullmatch(r"[\w.:-]+", body):  # GLM: a call without arguments
            call = Written(body, "{}")
    return [call] if call else None


_FUNCTION = re.compile(r"<function=([^>\s]+)>\s*(.*?)\s*</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def _coder(body: str, schemas: Schemas) -> Written | None:
    match = _FUNCTION.fullmatch(body)
    return None if match is None else _tagged(match[1], match[2], _PARAMETER, schemas)


def _glm(body: str, schemas: Schemas) -> Written | None:
    name, tag, rest = body.partition("<arg_key>")
    return _tagged(name.strip(), tag + rest, _ARGUMENT, schemas) if name.strip() else None


def _tagged(name: str, text: str, each: re.Pattern[str], schemas: Schemas) -> Written | None:
    arguments: dict[str, Json] = {}
    at = 0
    while at < len(text):
        match = each.match(text, at)
        if match is None:
            return None
        arguments[match[1].strip()] = _typed(match[2], schemas.get(name, {}), match[1].strip())
        at = match.end()
    return Written(name, json.dumps(arguments, ensure_ascii=False))


def _typed(text: str, schema: Mapping[str, Json], name: str) -> Json:
    properties = schema.get("properties")
    declared = properties.get(name) if isinstance(properties, dict) else None
    kind = declared.get("type") if isinstance(declared, dict) else None
    if kind == "string":
        return text
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


_KIMI = re.compile(
    r"\s*<\|tool_call_begin\|>\s*(?P<id>[^<\s]+)\s*<\|tool_call_argument_begin\|>\s*(?P<args>.*?)\s*<\|tool_call_end\|>\s*",
    re.DOTALL,
)
_DEEPSEEK = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<old>[^\n<]+)\n```json\n(?P<fenced>.*?)\n```"
    r"|(?P<name>[^<]+)<｜tool▁sep｜>(?P<args>.*?))\s*<｜tool▁call▁end｜>\s*",
    re.DOTALL,
)


def _each(body: str, pattern: re.Pattern[str], make: Callable[[re.Match[str]], Written]) -> list[Written] | None:
    calls: list[Written] = []
    at = 0
    while at < len(body):
        match = pattern.match(body, at)
        if match is None or not _is_object((call := make(match)).arguments):
            return None
        calls.append(call)
        at = match.end()
    return calls or None


def _kimi_call(match: re.Match[str]) -> Written:
    name = match["id"].removeprefix("functions.").rpartition(":")[0] or match["id"]
    return Written(name, match["args"], match["id"])


def _deepseek_call(match: re.Match[str]) -> Written:
    if match["old"] is not None:
        return Written(match["old"].strip(), match["fenced"].strip())
    return Written(match["name"].strip(), match["args"].strip())


def _llama(body: str, schemas: Schemas) -> list[Written] | None:
    """JSON objects, one after the other or with ``;`` between."""
    calls: list[Written] = []
    at = _skip(body, 0)
    while at < len(body):
        found = members(body, at)
        call = _json_call(found[0], bare=True) if found else None
        if found is None or call is None:
            return None
        calls.append(call)
        at = _skip(body, found[1])
        if body[at : at + 1] == ";":
            at = _skip(body, at + 1)
    return calls or None


# --- the families --------------------------------------------------------------------------------

HERMES = Family("hermes", "<tool_call>", "</tool_call>", _hermes)
KIMI = Family(
    "kimi",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    lambda body, _: _each(body, _KIMI, _kimi_call),
    marks=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
DEEPSEEK = Family(
    "deepseek",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    lambda body, _: _each(body, _DEEPSEEK, _deepseek_call),
    marks=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)
LLAMA = Family("llama", "<|python_tag|>", None, _llama, ends=("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>"), bare=True)
HARMONY = Family(
    "harmony",
    "<|start|>",
    "<|end|>",
    lambda body, _: [Written("", body)] if _is_object(body) else None,
    marks=("<|channel|>", "<|message|>", "<|constrain|>"),
    ends=("<|return|>", "<|call|>"),
)

_THINK = ("<think>", "</think>")
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<|user|>", "<|observation|>")


def family_of(tokenizer: Any) -> Family:
    """By what the chat template writes. A template without any of the marks is taken for Hermes', the commonest."""
    template = str(tokenizer.chat_template)
    if "<|channel|>" in template and "<|message|>" in template:
        return HARMONY
    for family in (KIMI, DEEPSEEK, HERMES):
        if family.open in template:
            return family
    return LLAMA if "<|start_header_id|>" in template or "<|python_tag|>" in template else HERMES


def marks_of(family: Family, tokenizer: Any) -> dict[int, str]:
    """The special tokens that mean something inside a reply: id → text."""
    marks = {family.open, family.close, *family.marks, *_THINK}
    return {id: text for id, text in _added(tokenizer).items() if text in marks}


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that are no text."""
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _added(tokenizer: Any) -> dict[int, str]:
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}


def stops_of(family: Family, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a reply: the tokenizer's own, and the ends of a turn that its vocabulary knows."""
    names = family.ends if family is HARMONY else (*family.ends, *_ENDS)
    found = {id for id, text in _added(tokenizer).items() if text in names}
    own = tokenizer.eos_token_id
    found |= set(own) if isinstance(own, list | tuple) else {own} if own is not None else set()
    return tuple(sorted(found))
