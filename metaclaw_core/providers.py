"""Which hosts are LLM providers, and which hosts the user trusts like one.

Design: a known provider, or a host that ``proxy.hosts`` names. Whoever can make the agent talk to a host of
his own writes both sides of that conversation, so only trusted hosts are a source of active skills or of a
caller's credential. Everybody else's traffic is recorded and no more.

Limits: a name is believed as mitmproxy saw it; a provider's subdomains (regional endpoints) count as it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

PROVIDERS = (
    "api.openai.com",
    "api.anthropic.com",
    "generativelanguage.googleapis.com",
    "aiplatform.googleapis.com",
    "openrouter.ai",
    "ollama.com",
    "api.moonshot.ai",
    "api.moonshot.cn",
    "dashscope.aliyuncs.com",
    "dashscope-intl.aliyuncs.com",
    "api.deepseek.com",
    "api.mistral.ai",
    "api.groq.com",
    "api.together.xyz",
    "api.x.ai",
    "api.z.ai",
    "open.bigmodel.cn",
    "api.minimax.io",
    "api.minimaxi.com",
    "api.fireworks.ai",
    "api.cerebras.ai",
    "integrate.api.nvidia.com",
    "chatgpt.com",
)

_SUFFIXES = tuple(f".{known}" for known in PROVIDERS)


def host_of(url_or_host: str) -> str | None:
    """The host name of a URL or of ``host[:port]``, lower case; None if there is none."""
    text = url_or_host if "//" in url_or_host else f"//{url_or_host}"
    try:
        return urlsplit(text).hostname
    except ValueError:
        return None


def is_trusted(host: str, port: int, hosts: Iterable[str]) -> bool:
    """Is it a known provider, or one of `hosts` (``proxy.hosts``: a name, ``name:port`` or a URL)?"""
    host = host.lower()
    return f".{host}".endswith(_SUFFIXES) or any(_names(entry, host, port) for entry in hosts)


def _names(entry: str, host: str, port: int) -> bool:
    try:
        parts = urlsplit(entry if "//" in entry else f"//{entry}")
        return parts.hostname == host and parts.port in (None, port)
    except ValueError:
        return False


# --- keys that may be borrowed ------------------------------------------------------------------

KEY_HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "api-key")
# A subscription's endpoint, or one whose requests are signed or carry a cloud's short-lived token.
_NO_KEYS = ("chatgpt.com", "aiplatform.googleapis.com", "amazonaws.com", "githubcopilot.com", "azure.com")
_SHAPES = {  # where a provider's API keys have a known shape, nothing else is one: (header, beginning)
    "api.openai.com": ("authorization", ("sk-",)),
    "api.anthropic.com": ("x-api-key", ("sk-ant-api",)),
    "generativelanguage.googleapis.com": ("x-goog-api-key", ("AIza", "AQ.")),
    "openrouter.ai": ("authorization", ("sk-or-",)),
}
_NO_API_KEY = re.compile(  # logins and short-lived tokens
    r"sk-ant-(?:oat|ort|sid)|ya29\.|eyJ|gh[a-z]_|github_pat_|tid=|(?:AKIA|ASIA)[A-Z0-9]{12}|sess-|AWS4|oauth|xox",
    re.IGNORECASE,
)
_KEY = re.compile(r"[!-~]{8,512}")
_JWT = re.compile(r"[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}")


def is_api_key(host: str, header: str, key: str) -> bool:
    """Is `key`, sent in `header` to `host`, a plain API key: no login, no subscription, no signature?

    In doubt it isn't.
    """
    host = host.lower()
    if header not in KEY_HEADERS or any(host == name or host.endswith(f".{name}") for name in _NO_KEYS):
        return False
    if not _KEY.fullmatch(key) or ";" in key or "," in key or _NO_API_KEY.match(key) or _JWT.fullmatch(key):
        return False
    for name, (wanted, beginnings) in _SHAPES.items():
        if host == name or host.endswith(f".{name}"):
            return header == wanted and key.startswith(beginnings)
    return True
