"""The judge: what a step of the agent was worth, by the votes of an LLM.

Design: the judge sees the instruction, the whole action and what came of it, never the system prompt
(`transcript`). It is asked `judge.votes` times in parallel, and a score needs more than half of the
votes that were asked for: an abstention weighs like a vote for nothing. An answer counts only if it
says one score and one only; anything else, a 10, a 0.5, two different scores, is an abstention. So an
answer can be worth +1, 0 or -1, and everything that is not known is None and never 0.

The same rules hold for comparing two candidates, which is how the judge itself is examined
(`calibrate`): there the order is swapped as well.

Limits: votes of one model at one temperature are not independent; `judge.models` lets several vote.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, Literal

import jinja2

from metaclaw_core.learn.llm import Completion, LLMClient
from metaclaw_core.learn.transcript import Rendered
from metaclaw_core.redact import redact_text
from metaclaw_core.settings import Judge

type Score = Literal[1, 0, -1]
type Choice = Literal["A", "B", "neither"]

PURPOSE = "judge"
_REASON_CHARS = 1_000
_PROMPTS = jinja2.Environment(
    loader=jinja2.PackageLoader("metaclaw_core.learn", "prompts"),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # noqa: S701 - plain text for a model; HTML entities would change what it reads
)


@dataclass(frozen=True, slots=True)
class Vote[V]:
    """One answer of the judge."""

    value: V | None  # None: it abstained
    problem: str | None  # why it is an abstention
    reason: str  # the judge's words before its verdict, redacted and cut
    model: str
    started_at: float  # unix seconds
    latency_ms: float  # retries and waiting for a free place included


async def all_ended[T](work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Every result, or the first exception once all have ended: none goes on while the client is being closed."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def reward_of(score: int | None) -> float | None:
    """What RL learns from: good is 1, bad is 0, and a score of 0 says nothing."""
    return {1: 1.0, -1: 0.0}.get(score) if score is not None else None


def majority[V](votes: Sequence[V | None]) -> V | None:
    """What more than half of all votes say, abstentions counted among them; None: no such majority."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return None
    [(value, count)] = counts.most_common(1)
    return value if 2 * count > len(votes) else None


# --- asking -------------------------------------------------------------------------------------


@cache
def prompt_version(name: Literal["judge", "pair"]) -> str:
    """Changes with the text of the prompt; kept with each vote."""
    names = (f"{name}_system.j2", "judge_turn.j2" if name == "judge" else "pair.j2")
    loader = _PROMPTS.loader
    if loader is None:
        raise AssertionError("the environment was made with a loader")
    return sha256("\n".join(loader.get_source(_PROMPTS, n)[0] for n in names).encode()).hexdigest()[:12]


def turn_messages(transcript: Rendered, *, next_known: bool) -> list[dict[str, str]]:
    return _messages("judge_system.j2", "judge_turn.j2", transcript, next_known=next_known)


def pair_messages(transcript: Rendered) -> list[dict[str, str]]:
    return _messages("pair_system.j2", "pair.j2", transcript)


def _messages(system: str, user: str, transcript: Rendered, **values: object) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": _PROMPTS.get_template(system).render(fence=transcript.fence)},
        {"role": "user", "content": _PROMPTS.get_template(user).render(transcript=transcript.text, **values)},
    ]


def model_of(client: LLMClient, settings: Judge, number: int) -> str:
    """Which model gives vote `number`."""
    models = settings.models or (client.endpoint.model,)
    return models[number % len(models)]


async def vote_on_turn(
    client: LLMClient, settings: Judge, messages: Sequence[dict[str, str]], model: str
) -> Vote[Score]:
    """Raises what `LLMClient.complete` raises."""
    return await _vote(client, settings, messages, model, parse_score)


async def vote_on_pair(
    client: LLMClient, settings: Judge, messages: Sequence[dict[str, str]], model: str
) -> Vote[Choice]:
    """Raises what `LLMClient.complete` raises."""
    return await _vote(client, settings, messages, model, parse_choice)


@dataclass(frozen=True, slots=True)
class Verdict[V]:
    value: V | None
    problem: str | None  # None where there is a value


async def _vote[V](
    client: LLMClient,
    settings: Judge,
    messages: Sequence[dict[str, str]],
    model: str,
    parse: Callable[[str], Verdict[V]],
) -> Vote[V]:
    started_at, started = time.time(), time.perf_counter()
    completion = await client.complete(
        messages, purpose=PURPOSE, max_tokens=settings.max_tokens, temperature=settings.temperature, model=model
    )
    latency_ms = (time.perf_counter() - started) * 1000
    verdict = parse(completion.text)
    return Vote(
        verdict.value, _problem(verdict, completion), _reason(completion.text), model, started_at, latency_ms
    )


def _problem[V](verdict: Verdict[V], completion: Completion) -> str | None:
    if verdict.problem is not None and completion.truncated:
        return f"{verdict.problem} (cut at max_tokens)"
    return verdict.problem


def _reason(text: str) -> str:
    return redact_text(_without_thinking(text).strip())[:_REASON_CHARS]


# --- reading the answer -------------------------------------------------------------------------

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCED_JSON = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL | re.IGNORECASE)
_MARKS = r"""[\s"'*_`]*"""  # Markdown and JSON around the word and the number
# All that hangs together with the number is taken with it: 10, 0.5, 1/5, 1% and "1 or 0" are no scores of ours.
_SCORE = re.compile(
    rf"(?<![A-Za-z])score{_MARKS}[:=]{_MARKS}([+-]?[0-9][0-9.,/%+-]*(?:\s*(?:/|or|to|out\s+of)\s*[+-]?[0-9]+)?)",
    re.IGNORECASE,
)
_BETTER = re.compile(
    rf"(?<![A-Za-z])better{_MARKS}[:=]{_MARKS}((?:A|B|neither)(?![A-Za-z])(?:\s*(?:/|or|and)\s*(?:A|B)\b)?)", re.IGNORECASE
)


def parse_score(text: str) -> Verdict[Score]:
    """The one score that an answer of the judge gives."""
    return _parse(text, "score", "score", _SCORE, _as_score)


def parse_choice(text: str) -> Verdict[Choice]:
    """The same for the better one of two candidates."""
    return _parse(text, "better", "choice", _BETTER, _as_choice)


def _parse[V](
    text: str, key: str, noun: str, pattern: re.Pattern[str], read: Callable[[str], V | None]
) -> Verdict[V]:
    # NFKC makes full-width letters, digits, signs and colons plain ones.
    plain = unicodedata.normalize("NFKC", _without_thinking(text)).replace("\u2212", "-").strip()
    stated = _json_value(plain, key)
    found = pattern.findall(plain) if stated is None else [stated]
    if not found:
        return Verdict(None, f"no {noun}")
    values = [read(word) for word in found]
    if any(value is None for value in values):
        return Verdict(None, f"not a {noun}: {', '.join(found)[:100]}")
    if len(set(values)) > 1:
        return Verdict(None, f"several {noun}s: {', '.join(found)[:100]}")
    return Verdict(values[0], None)


def _as_score(word: str) -> Score | None:
    words: dict[str, Score] = {"1": 1, "+1": 1, "0": 0, "-1": -1}
    return words.get(word.rstrip(".,+-"))


def _as_choice(word: str) -> Choice | None:
    words: dict[str, Choice] = {"a": "A", "b": "B", "neither": "neither"}
    return words.get(word.lower())


def _json_value(text: str, key: str) -> str | None:
    """The value of `key`, as text, where the answer is a JSON object; None: it is none, or has no such key."""
    fenced = _FENCED_JSON.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or key not in value:
        return None
    return value[key] if isinstance(value[key], str) else json.dumps(value[key])


def _without_thinking(text: str) -> str:
    """Models that think aloud weigh several scores before they give one."""
    return _THINKING.sub("", text)
