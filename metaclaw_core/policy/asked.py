"""What a client asks of the sampler, out of a request of any dialect; and what no sampler of ours can do.

Design: two answers. What would be wrong if it were ignored (a forced tool, a JSON schema, several answers, logprobs) is
refused, so that the request reaches its upstream. What only colours the answer (penalties, min_p) is left out, and the
answer is then of class C. An exploring session's temperature is 1 whatever the client asks.

Limits: names are looked up in all dialects' spellings at once; a dialect of another package has to use one of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaclaw_core.errors import MetaClawError
from metaclaw_core.model import Json, Request

logger = logging.getLogger(__name__)

_MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "maxOutputTokens", "num_predict")
_TOP_P = ("top_p", "topP")
_TOP_K = ("top_k", "topK")
_COUNT = ("n", "best_of", "candidateCount")
_FORMS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "responseSchema", "responseJsonSchema", "output_format")
_LEFT_OUT = (
    ("presence_penalty", 0), ("frequency_penalty", 0), ("presencePenalty", 0), ("frequencyPenalty", 0),
    ("repetition_penalty", 1), ("repeat_penalty", 1), ("min_p", 0), ("typical_p", 1), ("top_a", 0), ("min_tokens", 0),
)  # fmt: skip


class RefusedError(MetaClawError):
    """The request asks for what can't be done here."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is asked of the sampler. The defaults are the model's own distribution, which class A needs."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: no limit
    seed: int | None = None  # None: not repeatable


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the model's makers sample with (``generation_config.json``); None: they don't say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    sampling: Sampling
    not_a: str | None  # why the answer is not of class A; None: it may be


def plan(request: Request, defaults: Defaults, *, explore: bool, max_tokens: int) -> Plan:
    """`max_tokens`: where the client names no limit. Raises RefusedError."""
    asked = request.sampling
    _refuse(request)
    limit = _first(asked, _MAX_TOKENS)
    limit = int(limit) if _is_number(limit) and limit > 0 else max_tokens
    seed = asked.get("seed")
    seed = seed % 2**31 if isinstance(seed, int) and not isinstance(seed, bool) else None
    left_out = next((name for name, neutral in _LEFT_OUT if asked.get(name) not in (None, neutral)), None)
    if explore:
        return Plan(Sampling(limit, seed=seed), left_out and f"{left_out} was asked for")
    temperature = _number(asked.get("temperature"), defaults.temperature, 1.0)
    top_p = _number(_first(asked, _TOP_P), defaults.top_p, 1.0)
    top_k = int(_number(_first(asked, _TOP_K), defaults.top_k, -1))
    sampling = Sampling(limit, temperature, top_p if 0 < top_p < 1 else 1.0, top_k if top_k > 0 else -1, seed)
    if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, -1):
        return Plan(sampling, f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}")
    return Plan(sampling, left_out and f"{left_out} was asked for")


def _refuse(request: Request) -> None:
    asked, extra = request.sampling, request.extra
    for name in _COUNT:
        if _is_number(asked.get(name)) and asked[name] > 1:
            raise RefusedError(f"{asked[name]} answers at once ({name}) are not served.")
    if asked.get("logprobs") or asked.get("top_logprobs") or asked.get("responseLogprobs"):
        raise RefusedError("Log-probabilities of the answer are not served.")
    if asked.get("logit_bias"):
        raise RefusedError("logit_bias is not served.")
    if _forced(request):
        raise RefusedError("A forced tool call (tool_choice) is not served.")
    if form := _form(asked) or _form(extra):
        raise RefusedError(f"An answer of a given form ({form}) is not served.")
    if extra.get("background"):
        raise RefusedError("Answers in the background are not served.")
    for name in ("modalities", "responseModalities"):
        if any(str(kind).lower() != "text" for kind in asked.get(name) or ()):
            raise RefusedError(f"Only text is served, not what {name} asks for.")


def _forced(request: Request) -> bool:
    choice: Json = request.sampling.get("tool_choice")
    if isinstance(choice, dict):
        return choice.get("type") not in ("auto", "none")
    config = request.sampling.get("toolConfig")
    calling = config.get("functionCallingConfig") if isinstance(config, dict) else None
    if isinstance(calling, dict):
        return str(calling.get("mode", "AUTO")).upper() == "ANY"
    return choice not in (None, "auto", "none")


def _form(fields: Mapping[str, Json]) -> str | None:
    """The field that asks for JSON, a schema or a grammar."""
    for name in _FORMS:
        if fields.get(name):
            return name
    form = fields.get("response_format")
    if isinstance(form, dict) and form.get("type") not in (None, "text"):
        return "response_format"
    for name in ("text", "output_config"):
        holder = fields.get(name)
        form = holder.get("format") if isinstance(holder, dict) else None
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            return f"{name}.format"
    if fields.get("responseMimeType") not in (None, "", "text/plain"):
        return "responseMimeType"
    return "format" if fields.get("format") else None


def _first(fields: Mapping[str, Json], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _number(*values: Any) -> Any:
    return next(value for value in values if _is_number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def load_defaults(name_or_path: str) -> Defaults:
    """Of a model's folder or hub name; where nothing can be found, nothing is said. May ask the hub: not for the loop."""
    path = Path(name_or_path) / "generation_config.json"
    try:
        if not Path(name_or_path).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name_or_path, "generation_config.json"))
        found = json.loads(path.read_bytes())
        return Defaults(*(found.get(name) for name in ("temperature", "top_p", "top_k")))
    except (OSError, ValueError, AttributeError) as e:  # what the hub raises is one of these, too
        logger.info("No generation_config.json of %s: %s. Where a client names no values, temperature is 1.", name_or_path, e)
        return Defaults()
