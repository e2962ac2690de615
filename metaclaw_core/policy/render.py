"""A request as the token ids that the policy model is given, with the sampled ids of earlier replies in their places.

Design: the model's own chat template makes the text; without known replies the ids are those of ``apply_chat_template``,
token for token. A reply of ours that comes back in the history has been sampled as ids, and its text could be cut into
other ids than those. So the template is given the reply as we know it, its place is looked for in the rendered text (what
the template puts before an answer, then exactly the reply's text), and there the sampled ids are put. Since they decode
to the very text they replace, a prompt is always the template's text, and whatever ids it has are the ones that are
stored and trained on.

Templates rewrite history: most drop the reasoning of earlier turns, some trim or re-serialise. Then the reply's text is
not there, its ids are not used (`Prompt.missed`), and the message stays as the client sent it. A template that writes
the conversation before an answer differently once the answer is there never continues a prompt; that is found at the
start (`Renderer.problem`) and nothing is reused.

Reasoning that the client left out is put back only in the tool loop that is going on; earlier turns are as the client
has them.

Text in the conversation that spells a special token stays text, which is the one difference to what
``apply_chat_template`` does by default: a web page that a tool read could otherwise speak as the system.

Limits: a renderer is for one thread at a time; its readers are independent of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from metaclaw_core.model import Json, Message, Request, Role
from metaclaw_core.policy import families
from metaclaw_core.policy.canonical import reasoning_of, reply_key
from metaclaw_core.policy.context import TARGET, choose, leave_out
from metaclaw_core.policy.families import KIMI, Schemas
from metaclaw_core.policy.messages import NO_TOOLS, Abilities, Chat, RenderError, chat_of, declared
from metaclaw_core.policy.parse import ReplyReader, new_call_id
from metaclaw_core.policy.tokens import Encoder, decode
from metaclaw_core.wire.answer import Call

__all__ = ["Known", "Prompt", "RenderError", "Renderer", "load_tokenizer", "stop_strings", "stops_in"]

_REPLIES = 2_000  # read and remembered
_PROBE = "probe_4711"
_PROBE_SCHEMA = {"type": "object", "properties": {"path": {"type": "string", "description": "A path."}}}
_PROBE_TOOL: Chat = [
    {"type": "function", "function": {"name": _PROBE, "description": "Probe.", "parameters": _PROBE_SCHEMA}}
]
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Known(Protocol):
    """What a session knows of its own replies; one object per session, hashable by identity."""

    def tokens_of(self, key: str) -> Sequence[int] | None:
        """The ids whose text is the reply with that key (``canonical.reply_key``), stop id included; None: not ours."""


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    reused: int  # replies whose sampled ids are in it
    missed: int  # replies that are ours, but not to the letter in what the template makes of them
    trimmed: int  # pairs of call and result, or messages, left out for the context
    reused_ids: int = 0  # how many of `ids` those replies make


@dataclass(frozen=True, slots=True)
class _Reply:
    ids: tuple[int, ...]
    text: str
    message: Message  # as the model said it, with the ids of its own for the calls


def load_tokenizer(name_or_path: str) -> Any:
    """Of a model's folder or hub name. Raises RenderError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as e:
        raise RenderError("template", f"The tokenizer of {name_or_path} can't be loaded: {e}") from e


class Renderer:
    """Made once per model. Raises RenderError (template) where the model can't chat at all."""

    def __init__(self, tokenizer: Any, *, reasoning: bool = True) -> None:
        """`tokenizer`: of transformers. `reasoning`: let a model that can think do so, where its template has a switch."""
        if not tokenizer.chat_template:
            raise RenderError("template", "The policy model has no chat template; rl.model must name a chat model.")
        self._tokenizer = tokenizer
        self._reasoning = reasoning
        self._encoder = Encoder(tokenizer)
        self.family = families.family_of(tokenizer)
        self.stop_ids = families.stops_of(self.family, tokenizer)
        self.fingerprint = _fingerprint(tokenizer)
        self.abilities = Abilities()
        self._lead = ""  # what the template puts before an answer
        self._opens_reasoning: dict[Role, bool] = {}  # does a prompt end inside the reasoning, by its last message's role
        self.problem = self._examine()
        """Why no sampled ids can be reused with this template, as a sentence; None: they can."""
        self._replies: OrderedDict[tuple[str, tuple[int, ...]], _Reply | None] = OrderedDict()
        self._left_out: WeakKeyDictionary[Known, set[str]] = WeakKeyDictionary()

    # --- what the template can do ----------------------------------------------------------------

    def _examine(self) -> str | None:
        user: dict[str, Any] = {"role": "user", "content": "Are you there?"}
        answer: dict[str, Any] = {"role": "assistant", "content": "Yes, I am."}
        system = {"role": "system", "content": _PROBE}
        prompt = self._text([user], [])  # raises where not even this can be said
        self._lead = prompt[_common(prompt, self._text([user], [], generate=False)) :]
        self._opens_reasoning = dict.fromkeys((Role.USER, Role.TOOL), _opens_reasoning(prompt))
        self.abilities = Abilities(
            system=self._shows([system, user], []),
            late_system=self._shows([user, answer, system, user], []),
            repeated_user=self._shows([user, {**user, "content": _PROBE}], []),
            tools=self._shows([user], _PROBE_TOOL),
            global_ids=self.family is KIMI,
        )
        continues = self.abilities.tools and self._examine_tools(user)
        if not self._lead:
            return "The chat template of the policy model puts nothing before an answer, so sampled tokens can't be reused."
        after = self._text([user, answer, user], [])
        # Many templates keep reasoning in a tool loop only: then a prompt continues there.
        return None if continues or after.startswith(prompt) else _no_extension(prompt, after)

    def _examine_tools(self, user: dict[str, Any]) -> bool:
        """Find out how calls are written; does a prompt continue in a tool loop?"""
        result = {"role": "tool", "content": "Yes.", "name": _PROBE, "tool_call_id": "call00000"}
        for arguments in ({"path": "a"}, '{"path": "a"}'):
            function = {"name": _PROBE, "arguments": arguments}
            calls = [{"type": "function", "id": "call00000", "function": function}]
            call = {"role": "assistant", "content": "", "reasoning_content": "They ask.", "tool_calls": calls}
            try:
                before = self._text([user], _PROBE_TOOL, generate=False)
                prompt, after = self._text([user], _PROBE_TOOL), self._text([user, call, result], _PROBE_TOOL)
            except RenderError:
                continue
            if "{'path'" not in after and '\\"path' not in after:  # neither as Python nor as a string in JSON
                break
        else:
            self.abilities = replace(self.abilities, tools=False)
            return False
        self._opens_reasoning[Role.TOOL] = _opens_reasoning(after)
        continues = after.startswith(prompt)
        thinking = continues and _opens_reasoning(prompt)
        reader = self._reader(_schemas(_PROBE_TOOL), stops=(), call_id=lambda _: None, thinking=thinking)
        said = after[len(prompt) if continues else _common(before, after) :]
        events = [*reader.feed(self._encoder.encode(said)), *reader.finish()]
        readable = any(isinstance(event, Call) and event.name == _PROBE for event in events)
        self.abilities = replace(self.abilities, text_arguments=isinstance(arguments, str), readable=readable)
        return continues

    def _shows(self, chat: Chat, tools: Chat) -> bool:
        try:
            return _PROBE in self._text(chat, tools)
        except RenderError:
            return False

    def _text(self, chat: Chat, tools: Chat, *, generate: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                chat,
                tools=tools or None,
                add_generation_prompt=generate,
                tokenize=False,
                enable_thinking=self._reasoning,
                thinking=self._reasoning,
            )
        except (TemplateError, TypeError, ValueError, LookupError, RecursionError) as e:
            raise RenderError("template", f"The policy model's chat template refuses this conversation: {e}") from e
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JavaScript writes and no tokenizer reads
            text = _LONE_SURROGATE.sub("\ufffd", text)
        return text

    # --- prompts -----------------------------------------------------------------------------------

    def render(self, request: Request, known: Known, *, max_tokens: int) -> Prompt:
        """The prompt for the next reply, of at most `max_tokens` tokens. Raises RenderError."""
        tools = declared(request)
        if tools and not self.abilities.tools:
            raise RenderError("template", NO_TOOLS)
        if tools and not self.abilities.readable:
            raise RenderError("template", "The policy model writes tool calls in a form that is not known here.")
        if request.dialect == "anthropic" and request.messages and request.messages[-1].role is Role.ASSISTANT:
            raise RenderError("unsupported", "The policy model can't continue an answer that the request begins.")
        left_out = self._left_out.setdefault(known, set())
        messages, trimmed = leave_out(request.messages, left_out)
        prompt = self._assemble(messages, tools, known)
        if len(prompt.ids) > max_tokens:
            target, chosen = int(TARGET * max_tokens), set(left_out)
            while len(prompt.ids) > target:
                more = choose(request.messages, chosen, length=len(prompt.ids), target=target)
                if not more:
                    break
                chosen |= more
                messages, trimmed = leave_out(request.messages, chosen)
                prompt = self._assemble(messages, tools, known)
            if len(prompt.ids) > max_tokens:
                raise RenderError(
                    "too_long",
                    f"System prompt, tools and newest messages alone have {len(prompt.ids):,} tokens; "
                    f"the policy model takes {max_tokens:,} beside its reply.",
                )
            left_out |= chosen
        return replace(prompt, trimmed=trimmed)

    def _assemble(self, messages: Sequence[Message], tools: Chat, known: Known) -> Prompt:
        replies, missed = self._ours(messages, tools, known) if self.problem is None else ({}, 0)
        harmless = self._encoder.harmless
        declarations = harmless(tools)
        while True:
            ours = {i: reply.message for i, reply in replies.items()}
            try:
                chat = chat_of(messages, self.abilities, ours, harmless)
            except RecursionError as e:
                raise RenderError("unsupported", "The arguments of a call are nested too deeply.") from e
            text = self._text(chat, declarations)
            spans = self._places(text, replies)
            if len(spans) == len(replies):
                break
            missed += len(replies) - len(spans)
            replies = {i: reply for i, reply in replies.items() if i in spans}
        ids: list[int] = []
        at = 0
        for i, (start, end) in spans.items():
            ids += self._encoder.encode(text[at:start])
            ids += replies[i].ids
            at = end
        ids += self._encoder.encode(text[at:])
        return Prompt(tuple(ids), len(spans), missed, 0, sum(len(replies[i].ids) for i in spans))

    def _ours(self, messages: Sequence[Message], tools: Chat, known: Known) -> tuple[dict[int, _Reply], int]:
        """Our replies among the messages, by index; and how many are ours but came back as something else."""
        keys = {i: reply_key(m) for i, m in enumerate(messages) if m.role is Role.ASSISTANT}
        often = Counter(keys.values())
        loop = max((i for i in keys if not messages[i].tool_calls), default=-1)  # the last finished answer
        found: dict[int, _Reply] = {}
        missed = 0
        for i, key in keys.items():
            ids = known.tokens_of(key)
            if ids is None or len(ids) == 0:
                continue
            reply = self._reply(key, tuple(ids), tools)
            if reply is not None:
                said, came = reasoning_of(reply.message), reasoning_of(messages[i])
                # Where several messages look the same, nobody can say which of their thoughts were left out.
                if said == came or (not came and i > loop and often[key] == 1):
                    found[i] = reply
                    continue
            missed += 1
        return found, missed

    def _reply(self, key: str, ids: tuple[int, ...], tools: Chat) -> _Reply | None:
        """What the ids say; None: not the message with that key."""
        if (key, ids) in self._replies:
            self._replies.move_to_end((key, ids))
            return self._replies[key, ids]
        found = None
        # None: marks of a call are text, as where no tools were declared.
        for schemas, last in product((_schemas(tools) or {}, None), (Role.USER, Role.TOOL)):
            thinking = self._opens_reasoning[last]
            reader = self._reader(schemas, stops=(), call_id=lambda written: written.id, thinking=thinking)
            reader.feed(ids)
            reader.finish()
            if reply_key(reader.message) == key:
                found = _Reply(ids, decode(self._tokenizer, ids), reader.message)
                break
        self._replies[key, ids] = found
        if len(self._replies) > _REPLIES:
            self._replies.popitem(last=False)
        return found

    def _places(self, text: str, replies: Mapping[int, _Reply]) -> dict[int, tuple[int, int]]:
        """Where the replies stand in the text, to the letter and in their order; those that don't are left out."""
        spans: dict[int, tuple[int, int]] = {}
        at = 0
        for i, reply in replies.items():
            found = text.find(self._lead + reply.text, at)
            start = found + len(self._lead)
            end = start + len(reply.text)
            if found < 0 or not (reply.ids[-1] in self.stop_ids or self._encoder.is_boundary(text, end)):
                continue
            spans[i] = start, end
            at = end
        return spans

    # --- replies -----------------------------------------------------------------------------------

    def reader(self, request: Request) -> ReplyReader:
        """For the reply to `request`: with its stop strings, and calls only where it declares tools."""
        dialect = request.dialect
        after_result = bool(request.messages) and request.messages[-1].role is Role.TOOL
        return self._reader(
            _schemas(declared(request)),
            stops=stop_strings(request),
            call_id=lambda _: new_call_id(dialect),
            thinking=self._opens_reasoning[Role.TOOL if after_result else Role.USER],
        )

    def _reader(self, schemas: Schemas | None, *, stops: Sequence[str], call_id: Any, thinking: bool) -> ReplyReader:
        return ReplyReader(
            self._tokenizer,
            self.family,
            stop_ids=self.stop_ids,
            stops=stops,
            schemas=schemas,
            thinking=thinking,
            call_id=call_id,
        )


def stop_strings(request: Request) -> tuple[str, ...]:
    """Those of the client, whatever its dialect calls them."""
    return stops_in(request.sampling)


def stops_in(sampling: Mapping[str, Json]) -> tuple[str, ...]:
    """The same of a request's sampling parameters alone, as the store keeps them."""
    for name in ("stop", "stop_sequences", "stopSequences"):
        value = sampling.get(name)
        if isinstance(value, str):
            return (value,) if value else ()
        if isinstance(value, list):
            return tuple(stop for stop in value if isinstance(stop, str) and stop)
    return ()


def _schemas(tools: Chat) -> Schemas | None:
    return {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools} or None


def _common(a: str, b: str) -> int:
    """How many characters at the beginning are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _opens_reasoning(prompt: str) -> bool:
    return prompt.rstrip().endswith("<think>")


def _no_extension(prompt: str, after: str) -> str:
    at = _common(prompt, after)
    return (
        "The chat template of the policy model writes a conversation differently once an answer follows: after "
        f"{prompt[max(0, at - 30) : at]!r} comes {prompt[at : at + 20]!r} first and then {after[at : at + 20]!r}. So a "
        "prompt never continues the one before, and the sampled tokens of earlier replies can't be reused."
    )


def _fingerprint(tokenizer: Any) -> str:
    added = {id: repr(token) for id, token in tokenizer.added_tokens_decoder.items()}
    state = [sorted(tokenizer.get_vocab().items()), sorted(added.items()), tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
