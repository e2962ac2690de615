"""What the wizard knows of LLM providers, and which models a Tinker server offers.

Limits: model names age; they are suggestions for the prompt, and whatever is typed is taken. The list of a Tinker
server is asked for over HTTP, so that setup needs no SDK; where it can't be had the name is typed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from metaclaw_core.addresses import forbidden_url
from metaclaw_core.learn.estimate import Offered

TINKER_CLOUD = "https://tinker.thinkingmachines.dev/services/tinker-prod"
LOCAL_ENGINE = "http://127.0.0.1:8300"  # `metaclaw engine` without --port


@dataclass(frozen=True, slots=True)
class Preset:
    api_base: str  # "": has to be typed
    model_id: str
    needs_key: bool = True


PRESETS = {
    "kimi": Preset("https://api.moonshot.ai/v1", "kimi-k2.5"),
    "qwen": Preset("https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "qwen-plus"),
    "openai": Preset("https://api.openai.com/v1", "gpt-5.5"),
    "openrouter": Preset("https://openrouter.ai/api/v1", "moonshotai/kimi-k2.5"),
    "ollama": Preset("http://127.0.0.1:11434/v1", "qwen3:8b", needs_key=False),
    "custom": Preset("", "", needs_key=False),
}


@dataclass(frozen=True, slots=True)
class Offer:
    models: tuple[Offered, ...]  # that can be trained; () where the server did not say
    problem: str | None = None  # why there is no list


def tinker_models(base_url: str, api_key: str, timeout: float = 5.0) -> Offer:
    """The models that the server of the Tinker API at `base_url` ("": the cloud) can train."""
    base = (base_url or TINKER_CLOUD).rstrip("/")
    if (problem := forbidden_url(base)) is not None:
        return Offer((), f"{base} is {problem}")
    local = urlsplit(base).hostname in ("127.0.0.1", "localhost", "::1")
    try:
        answer = httpx.get(
            f"{base}/api/v1/get_server_capabilities",
            headers={"X-API-Key": api_key} if api_key else {},
            timeout=timeout,
            trust_env=not local,  # a proxy of the environment leads to the cloud, not to this machine
        )
        answer.raise_for_status()
        offered = answer.json()["supported_models"]
        models = [_offered(m) for m in offered if m.get("model_name") and m.get("trainable") is not False]
    except httpx.HTTPStatusError as e:
        return Offer((), f"{base} answered {e.response.status_code}")
    except httpx.HTTPError as e:
        return Offer((), f"{base} can't be reached ({type(e).__name__})")
    except (ValueError, KeyError, TypeError, AttributeError, httpx.InvalidURL):
        return Offer((), f"{base} did not answer as a Tinker server does")
    return Offer(tuple({model.name: model for model in models}.values()))


def _offered(row: dict[str, Any]) -> Offered:
    context = row.get("max_context_length")
    return Offered(str(row["model_name"]), context if isinstance(context, int) and context > 0 else None)
