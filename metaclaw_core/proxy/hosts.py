"""Which hosts are LLM providers, for deciding what to decrypt.

Design: `metaclaw start` opens the TLS of these hosts only and passes everything else with its original
certificate. The list holds the providers an agent can be pointed at by name; what is missing is added
by ``proxy.hosts``, ``llm.api_base`` and the base URLs found in the agent's own configuration.

Limits: OpenClaw's configuration is JSON5 in principle; it is searched for URLs as text, not parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from metaclaw_core.providers import PROVIDERS, host_of
from metaclaw_core.settings import Settings

__all__ = ["PROVIDERS", "agent_config_files", "allow_hosts", "configured_hosts", "host_of"]

_BASE_URL = re.compile(r"""["']?base_?url["']?\s*[:=]\s*["'](https?://[^"'\s]+)["']""", re.IGNORECASE)


def configured_hosts(settings: Settings, agent_configs: Iterable[Path]) -> set[str]:
    """The hosts the user named: in our settings and in the agent's configuration files."""
    urls = [*settings.proxy.hosts, settings.llm.api_base]
    for path in agent_configs:
        try:
            urls += _BASE_URL.findall(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # this agent is not installed, or its file is not ours to read
    return {host for url in urls if url and (host := host_of(url))}


def agent_config_files(home: Path) -> list[Path]:
    """Where agents keep their base URLs, under the user's home."""
    return [home / ".openclaw" / "openclaw.json", home / ".claude" / "settings.json", home / ".codex" / "config.toml"]


def allow_hosts(hosts: Iterable[str]) -> list[str]:
    """Anchored patterns for mitmproxy's ``allow_hosts``; they match ``host:port``."""
    return [rf"^(.+\.)?{re.escape(host)}:\d+$" if host in PROVIDERS else rf"^{re.escape(host)}:\d+$" for host in sorted(hosts)]
