"""Which hosts are LLM providers, and which hosts the user trusts like one.

Design: a known provider, or a host that ``proxy.hosts`` names. Whoever can make the agent talk to a host of
his own writes both sides of that conversation, so only trusted hosts are a source of active skills or of a
caller's credential. Everybody else's traffic is recorded and no more.

Limits: a name is believed as mitmproxy saw it; a provider's subdomains (regional endpoints) count as it.
"""

from __future__ import annotations

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
    if any(host == known or host.endswith(f".{known}") for known in PROVIDERS):
        return True
    return any(_names(entry, host, port) for entry in hosts)


def _names(entry: str, host: str, port: int) -> bool:
    try:
        parts = urlsplit(entry if "//" in entry else f"//{entry}")
        return parts.hostname == host and parts.port in (None, port)
    except ValueError:
        return False
