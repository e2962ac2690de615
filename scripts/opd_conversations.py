"""What a student may be asked: the conversations of a metaclaw home, a capture or a JSONL file, and their prompts as token ids.

A prompt is what a recorded request held, rendered as the policy server would. Side turns, secrets, histories that are not whole
and prompts that can't be rendered are left out and counted.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any

from metaclaw_core.errors import CaptureError, ConfigError, WireError
from metaclaw_core.model import Kind, Message, Request, Role, Tool
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.wire import by_name
from metaclaw_core.wire.jsonio import loads_object

EVERY = 4  # of the conversations one is held out
QUESTIONS = (
    "What is on my list for today?", "Please tidy up my notes.", "Write a test for the parser.", "Why does the build fail?",
    "Rename the file and commit it.", "Read the log and tell me what broke.", "Plan the release for Friday.", "Summarise this thread.",
    "Which of my branches are stale?", "Book a table for two.", "Translate the README to French.", "Find the slowest query.",
    "Explain this stack trace.", "Draft an answer to Ada.", "Is the backup of last night complete?", "Compare the two quotes.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What one reply is asked for. Requests of one session go on from each other: they are learnt from or held out together."""

    session: str
    request: Request


def conversations(source: Path | None) -> list[Asked]:
    """What may be asked. Raises ConfigError, which says what is wrong with `source`."""
    if source is None:
        return [Asked(text, _asks(text)) for text in QUESTIONS]
    if source.is_dir():
        if not (source / "store.db").is_file():
            raise ConfigError(f"{source} is no metaclaw home, it has no store.db: name a home, a capture or a JSONL file.")
        with open_store(source / "store.db") as store:
            return _recorded(store, str(source))
    if not source.is_file():
        raise ConfigError(f"{source} is not there: name a metaclaw home, a capture or a JSONL file.")
    return _lines(source) if source.suffix == ".jsonl" else _captured(source)


def _asks(text: str) -> Request:
    return by_name("openai_chat").parse_request(json.dumps({"messages": [{"role": "user", "content": text}]}).encode(), "/")


def _lines(file: Path) -> list[Asked]:
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = loads_object(line, "conversation")
            if isinstance(value.get("instruction"), str):
                found.append(_asks(value["instruction"]))
            else:
                found.append(by_name("openai_chat").parse_request(line, "/"))
        except WireError as e:
            raise ConfigError(f'{file}, line {number}: {e}; each line is {{"messages": […]}} or {{"instruction": "…"}}.') from e
    return [Asked(str(n), replace(request, messages=_until_an_answer(request.messages))) for n, request in enumerate(found)]


def _captured(file: Path) -> list[Asked]:
    from metaclaw_core.proxy.readflows import read_exchanges

    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "store.db") as store, file.open("rb") as opened:
        try:
            for some in batched((e for e in read_exchanges(opened, str(file), secrets.token_bytes(32)) if e is not None), 64):
                store.ingest(some)
        except CaptureError as e:
            raise ConfigError(f"{e} Conversations in JSONL need a name that ends in .jsonl.") from e
        return _recorded(store, str(file))


def _recorded(store: Store, where: str) -> list[Asked]:
    """Of each prompt one; side turns, secrets and histories that are not whole are left out."""
    found: dict[str, Asked] = {}
    for row in store.turns():
        whole = row["prompt_tip"] is not None and row["history_known"] is not False and not row["redacted"]
        if whole and row["kind"] in (Kind.MAIN, Kind.TOOL, Kind.SUBAGENT):
            tools = store.blob(row["tools"])
            said = store.conversation(row["prompt_tip"])
            request = Request(row["dialect"], row["model"], False, said, tuple(map(_tool, tools if isinstance(tools, list) else ())))
            found[row["prompt_tip"]] = Asked(row["session"] or row["prompt_tip"], request)
    if not found:
        raise ConfigError(f"{where} holds no turns that a student could be asked.")
    return list(found.values())


def _tool(raw: Any) -> Tool:
    value = raw.get("function", raw) if isinstance(raw, dict) else {}
    return Tool(str(value.get("name") or ""), value.get("description"), raw)


def _until_an_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A recorded conversation may end with the answer: that is the student's to give."""
    kept = list(messages)
    while kept and kept[-1].role is Role.ASSISTANT:
        kept.pop()
    return tuple(kept)


def last_words(asked: Sequence[Asked]) -> list[Asked]:
    found = []
    for one in asked:
        texts = (m.text for m in reversed(one.request.messages) if m.role is Role.USER and m.text.strip())
        if (text := next(texts, None)) is not None:
            found.append(Asked(one.session, _asks(text)))
    return found


class _Nothing:
    """Nothing was said before that could be reused."""

    def tokens_of(self, key: str) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Prompts:
    learnt_from: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...]  # that end a reply
    left_out: Mapping[str, int]  # how many, by reason


def prompts_of(asked: Sequence[Asked], tokenizer: Any, most: int) -> Prompts:
    """Token ids of each, every fourth session held out. Raises RenderError, and ConfigError where too few are left."""
    from metaclaw_core.policy.render import Renderer, RenderError

    renderer = Renderer(tokenizer)
    sessions: dict[tuple[int, ...], str] = {}
    left_out: dict[str, int] = {}
    for one in asked:
        plain = one.request if renderer.abilities.tools else replace(one.request, tools=())
        try:
            ids = renderer.render(plain, _Nothing(), max_tokens=most).ids
        except RenderError as e:
            left_out[e.kind] = left_out.get(e.kind, 0) + 1
            continue
        sessions.setdefault(ids, one.session)
    named = list(dict.fromkeys(sessions.values()))
    if len(named) < 2:
        because = f" (left out: {told(left_out)})" if left_out else ""
        raise ConfigError(
            f"{len(sessions)} of {len(asked)} prompts can be used{because}, of {len(named)} conversations, and two are needed, one to "
            "learn from and one to measure on: give more, or a larger --max-prompt-tokens."
        )
    held_out = set(named[EVERY - 1 :: EVERY] or named[-1:])
    return Prompts(
        tuple(ids for ids, session in sessions.items() if session not in held_out),
        tuple(ids for ids, session in sessions.items() if session in held_out),
        tuple(renderer.stop_ids),
        left_out,
    )


def told(left_out: Mapping[str, int]) -> str:
    """How many were left out, and why."""
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items())
