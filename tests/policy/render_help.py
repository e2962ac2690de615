"""Tokenizers and chat templates that behave like those of the model families, made without a download; recorded requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from metaclaw_core.model import Message, Part, Request, Role, Text, Tool, ToolCall, ToolResult
from metaclaw_core.policy.canonical import reply_key

MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Tools in the system prompt, results in user messages, reasoning only after the last message of a user.
QWEN = r"""
{%- if tools -%}
{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif -%}
{{ 'You may call functions.\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor -%}
{{ '\n</tools>\nA call is {"name": …, "arguments": {…}} between call marks.<|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif -%}
{%- set ns = namespace(asked=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}
{%- if m.reasoning_content and (keep_thinking or loop.index0 > ns.asked) -%}
{{ '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}
{%- endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{%- if m.content or not loop.first %}{{ '\n' }}{% endif -%}
{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""

# Reasoning is opened by the prompt, and kept in all of the history.
OPENED = QWEN.replace("(keep_thinking or loop.index0 > ns.asked)", "true").replace(
    r"{{ '<|im_start|>assistant\n' }}{% if enable", r"{{ '<|im_start|>assistant\n<think>\n' }}{% if enable"
)

# A beginning-of-text token, trimmed text, roles that have to alternate, one call as bare JSON.
LLAMA = r"""
{{- '<|begin|>' -}}
{%- set ns = namespace(last='') -%}
{%- for m in messages -%}
{%- if m.role == ns.last and m.role == 'user' %}{{ raise_exception('user and assistant must alternate') }}{% endif -%}
{%- set ns.last = m.role -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}{{ m.tool_calls[0].function.arguments | tojson }}
{{- '}<|eot_id|>' }}
{%- else -%}
{%- set role = 'ipython' if m.role == 'tool' else m.role -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- if loop.first and tools -%}
{%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}
"""

# The newline after <|im_end|> is written before the next message, and forgotten before the answer that is asked for.
EATS_A_NEWLINE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The newline after the role is eaten by the minus of the block after it.
EATS_THE_NEWLINE_OF_A_ROLE = CHATML.replace("{{ m.content }}", "{%- if m.content %}{{ m.content }}{% endif %}")
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    template: str,
    texts: Iterable[str] = (),
    *,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    marks: Sequence[str] = MARKS,
    eos: str = "<|im_end|>",
    vocab_size: int = 2000,
) -> Any:
    """A byte-level BPE tokenizer trained on `texts`. `marks`: added tokens that are not special, as Qwen's are."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*special, *alphabet])}, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts := list(texts):
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template)


@cache
def tokenizer_of(template: str) -> Any:
    """Trained on this file, so that words are tokens of several characters."""
    if template == LLAMA:
        special = ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
        return make_tokenizer(template, [own_text()], special=special, marks=(), eos="<|eot_id|>", vocab_size=900)
    return make_tokenizer(template, [own_text()], vocab_size=900)


def own_text() -> str:
    return Path(__file__).read_text(encoding="utf-8")


@dataclass(eq=False)
class Kept:
    """The simplest `Known`."""

    tokens: dict[str, Sequence[int]] = field(default_factory=dict)

    def tokens_of(self, key: str) -> Sequence[int] | None:
        return self.tokens.get(key)

    def add(self, message: Message, ids: Sequence[int]) -> None:
        self.tokens[reply_key(message)] = ids


# --- short ways to say what tests say often ------------------------------------------------------


def system(text: str) -> Message:
    return Message(Role.SYSTEM, (Text(text),))


def user(text: str) -> Message:
    return Message(Role.USER, (Text(text),))


def assistant(*parts: Part | str) -> Message:
    return Message(Role.ASSISTANT, tuple(Text(part) if isinstance(part, str) else part for part in parts))


def call(name: str, arguments: str = "{}", id: str | None = "call_1") -> ToolCall:
    return ToolCall(name, arguments, id)


def result(text: str, id: str | None = "call_1") -> Message:
    return Message(Role.TOOL, (ToolResult(text, call_id=id),))


READ = Tool(
    "read",
    "Read a file.",
    {
        "type": "function",
        "function": {
            "name": "read",
            "description": "Read a file.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}},
        },
    },
)


def request(*messages: Message, tools: Sequence[Tool] = (), dialect: str = "openai_chat", **sampling: Any) -> Request:
    return Request(dialect, "m", False, messages, tuple(tools), sampling)


def recorded(flows: Iterable[Any]) -> Iterator[Request]:
    """The requests of recorded flows, of any dialect."""
    from metaclaw_core.wire import find_route

    for flow in flows:
        found = find_route(flow.request.method, flow.request.path)
        if found is not None:
            yield found[0].parse_request(flow.request.get_content(), flow.request.path)


def full_recordings(folder: Path) -> Iterator[Request]:
    from mitmproxy import io

    for path in sorted(folder.glob("*.mitm")):
        with path.open("rb") as file:
            yield from recorded(list(io.FlowReader(file).stream()))


type Capture = Callable[[str], list[Any]]
NAMES = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "captures").glob("*.mitm")))
