"""Where a model is asked, and which one the settings mean.

Design: an `Endpoint` is checked when it is made, so that a client can't be built on nonsense. The judge
is ``rl.prm_*``, the evolver ``rl.evolver_*``; what they leave empty is taken from ``llm.*``, the key only
where both are one origin: a key is never sent to a host it was not given for.

Limits: model names of the presets are those of the reference system and will age; ``llm.model_id`` wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from metaclaw_core.addresses import forbidden_host
from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import Settings


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is, and the key for it. Raises ConfigError for what can't be one."""

    api_base: str  # "https://api.openai.com/v1"; a whole path ending in /chat/completions or /messages is taken as is
    model: str
    api_key: str = field(repr=False)  # "": the server wants none
    dialect: Literal["openai", "anthropic"] = "openai"

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.api_base)
            bad = parts.port == 0
        except ValueError as e:
            raise ConfigError(f"The API base {self.api_base!r} is not a URL: {e}.") from e
        if bad or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"The API base {self.api_base!r} must be http(s)://HOST[:PORT][/PATH].")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ConfigError(f"The API base of {parts.hostname} must hold neither a user, a query nor a fragment.")
        if (problem := forbidden_host(parts.hostname)) is not None:
            raise ConfigError(f"The API base {self.api_base} is {problem}.")
        if not self.model:
            raise ConfigError(f"No model is named for {parts.hostname}.")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError(f"The API key for {parts.hostname} holds characters that no key has.")

    @property
    def origin(self) -> tuple[str, str, int]:
        """(scheme, host, port); equal origins may share a key."""
        parts = urlsplit(self.api_base)
        return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def url(self) -> str:
        base = self.api_base.rstrip("/")
        if self.dialect == "openai":
            return base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        if base.endswith("/messages"):
            return base
        return f"{base}/messages" if base.endswith("/v1") else f"{base}/v1/messages"


PRESETS: Mapping[str, tuple[str, str]] = {  # provider → API base, model where none is named ("": it must be)
    "kimi": ("https://api.moonshot.cn/v1", "kimi-k2.5"),
    "qwen": ("https://dashscope.aliyuncs.com/compatible-mode/v1", "qwen-plus"),
    "openai": ("https://api.openai.com/v1", "gpt-4o"),
    "openrouter": ("https://openrouter.ai/api/v1", "google/gemini-2.5-pro"),
    "ollama": ("http://127.0.0.1:11434/v1", ""),
}


def llm_endpoint(settings: Settings) -> Endpoint | None:
    """What ``llm.*`` names; None if it names nothing that can be asked. Raises ConfigError for a half of it.

    A provider of the presets needs a key, except Ollama; an API base of one's own may do without.
    """
    llm = settings.llm
    base, model = PRESETS.get(llm.provider, ("", ""))
    key = llm.api_key.strip()
    if not (llm.api_base or base) or not (key or llm.api_base or llm.provider == "ollama"):
        if llm.provider == "custom" or key:
            raise ConfigError("llm.api_base is needed: llm.provider names no provider whose address is known.")
        return None
    if not (llm.model_id or model):
        raise ConfigError("llm.model_id is needed: it names the model that llm.api_base is asked for.")
    return _endpoint(llm.api_base or base, llm.model_id or model, key)


def judge_endpoint(settings: Settings) -> Endpoint | None:
    """Who scores turns; None: nobody. Raises ConfigError."""
    if not settings.judge.enabled:
        return None
    rl = settings.rl
    return _own_or_llm(settings, "rl.prm_url", "rl.prm_model", rl.prm_url, rl.prm_model, rl.prm_api_key)


def evolver_endpoint(settings: Settings) -> Endpoint | None:
    """Who writes skills; None: nobody that the settings name. Raises ConfigError."""
    rl = settings.rl
    names = ("rl.evolver_api_base", "rl.evolver_model")
    return _own_or_llm(settings, *names, rl.evolver_api_base, rl.evolver_model, rl.evolver_api_key)


def _own_or_llm(
    settings: Settings, base_name: str, model_name: str, base: str, model: str, key: str
) -> Endpoint | None:
    general = llm_endpoint(settings)
    if not base:
        if general is None or not (model or key):
            return general
        return _endpoint(general.api_base, model or general.model, key.strip() or general.api_key)
    # An endpoint needs a model; which one it is asked for does not matter for the comparison of origins.
    same = general is not None and _endpoint(base, model or "?", "").origin == general.origin
    if same and general is not None:
        return _endpoint(base, model or general.model, key.strip() or general.api_key)
    if not model:
        raise ConfigError(f"{model_name} is needed: it names the model that {base_name} is asked for.")
    return _endpoint(base, model, key.strip())


def _endpoint(base: str, model: str, key: str) -> Endpoint:
    host = urlsplit(base).netloc.lower()
    anthropic = host == "api.anthropic.com" or base.rstrip("/").endswith("/messages")
    return Endpoint(base, model, key, "anthropic" if anthropic else "openai")
