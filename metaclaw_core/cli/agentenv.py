"""The environment that lets a program use the proxy, as a value: for a child (``run``) and a shell (``env``).

Design: everything is per process, and nothing of the user's is written: proxy variables in both spellings, our CA for
Node beside its own list, and for OpenSSL-based programs (curl, git, Python) a bundle of all CAs they had plus ours,
because their variables *replace* the list. The bundle lies under METACLAW_HOME and is named by its content, so that
no shell's bundle changes under it.

``NO_PROXY`` keeps what has nothing to do with LLMs; a host we are here for is taken out, since the proxy connects to
it as directly as the program would have. ``OPENCLAW_PROXY_URL`` reaches what OpenClaw's own HTTP client sends past
``HTTPS_PROXY`` (Ollama's cloud), but makes it send loopback base URLs past every proxy; so it is left out where the
agent's configuration names one.

Limits: a NO_PROXY entry is compared as a name or a domain suffix; address ranges are kept as they are. A corporate
proxy in HTTPS_PROXY is not chained to: that is said, with the option that does it.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from metaclaw_core.proxy.hosts import PROVIDERS, agent_config_files, configured_hosts
from metaclaw_core.settings import Settings, private_dir
from metaclaw_core.skills.files import write_atomic

_REPLACING = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO")
_REPLACING_WHERE_SET = ("AWS_CA_BUNDLE", "PIP_CERT", "CARGO_HTTP_CAINFO", "DENO_CERT", "NIX_SSL_CERT_FILE")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
# Where systems keep the bundle, beside what Python's own OpenSSL was built for.
_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True, slots=True)
class AgentEnv:
    variables: dict[str, str]
    notes: list[str] = field(default_factory=list)  # sentences for the user

    def over(self, environment: Mapping[str, str]) -> dict[str, str]:
        return {**environment, **self.variables}


def agent_env(environment: Mapping[str, str], settings: Settings, home: Path, port: int, ca: Path) -> AgentEnv:
    """What to add to `environment` so that a program uses the proxy on `port` and trusts `ca`."""
    url = f"http://127.0.0.1:{port}"
    hosts = configured_hosts(settings, agent_config_files(Path(environment.get("HOME") or "~").expanduser()))
    notes: list[str] = []
    variables = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), url)
    before = {environment[name] for name in variables if environment.get(name)} - {url}
    if upstream := next((value for value in sorted(before) if not _is_ours(value)), None):
        notes.append(
            f"Your environment names the proxy {_no_credentials(upstream)}, and MetaClaw connects directly. If that fails: "
            "metaclaw start --set mode=upstream:URL."
        )
    bundle = str(_bundle(home, _ca_files(environment), ca))
    variables |= dict.fromkeys((*_REPLACING, *filter(environment.get, _REPLACING_WHERE_SET)), bundle)
    own = Path(environment.get("NODE_EXTRA_CA_CERTS") or "/nonexistent")
    variables["NODE_EXTRA_CA_CERTS"] = str(_bundle(home, [own], ca) if own.is_file() else ca)
    if not hosts & set(_LOOPBACK):
        variables["OPENCLAW_PROXY_URL"] = url
    elif "ollama.com" in hosts:
        notes.append(
            "OpenClaw sends ollama.com past this proxy: OPENCLAW_PROXY_URL would change that, but then its LLMs on this "
            f"machine go past. To have it the other way round set OPENCLAW_PROXY_URL={url} yourself."
        )
    no_proxy = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    kept, dropped = split_no_proxy(no_proxy, {*PROVIDERS, *hosts})
    if dropped:
        notes.append(f"NO_PROXY without {', '.join(dropped)}: that is LLM traffic, which MetaClaw is here for.")
        variables["NO_PROXY"] = variables["no_proxy"] = ",".join(kept)
    return AgentEnv(variables, notes)


def split_no_proxy(no_proxy: str, hosts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The entries that have nothing to do with `hosts`, and those that would send one of them past the proxy."""
    kept: list[str] = []
    dropped: list[str] = []
    hosts = tuple(hosts)
    for entry in filter(None, (part.strip() for part in re.split(r"[,\s]", no_proxy))):
        (dropped if any(_covers(entry, host) for host in hosts) else kept).append(entry)
    return kept, dropped


def _covers(entry: str, host: str) -> bool:
    if entry == "*":
        return True
    name = entry.lower().removeprefix("*").lstrip(".")
    bare = name.rpartition(":")[0] if name.count(":") == 1 else name.strip("[]")
    return bool(bare) and (host == bare or host.endswith(f".{bare}"))


def _is_ours(url: str) -> bool:
    return any(f"//{host}:" in url for host in ("127.0.0.1", "localhost"))


def _no_credentials(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


def _ca_files(environment: Mapping[str, str]) -> list[Path]:
    """What the program trusts now, as files."""
    named = [Path(environment[name]) for name in (*_REPLACING, *_REPLACING_WHERE_SET) if environment.get(name)]
    if environment.get("SSL_CERT_FILE"):
        return named
    defaults = ssl.get_default_verify_paths()
    system = next((p for p in map(Path, filter(None, (defaults.cafile, *_SYSTEM_BUNDLES))) if p.is_file()), None)
    if system is None:
        import certifi

        system = Path(certifi.where())
    return [system, *named]


def _bundle(home: Path, files: Iterable[Path], ca: Path) -> Path:
    """A file with the certificates of `files` and `ca`, each once. A file that can't be read adds nothing, as it
    does now."""
    certificates: dict[bytes, None] = {}
    for file in (*files, ca):
        try:
            certificates |= dict.fromkeys(_CERTIFICATE.findall(file.read_bytes()))
        except OSError:
            if file == ca:
                raise
    data = b"\n".join(certificates) + b"\n"
    path = private_dir(home / "ca") / f"bundle-{sha256(data).hexdigest()[:12]}.pem"
    if not path.exists():
        write_atomic(path, data)
    return path


def current_environment() -> dict[str, str]:
    return dict(os.environ)  # noqa: TID251 - it is handed on, not read for settings
