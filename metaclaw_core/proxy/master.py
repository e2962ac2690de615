"""``metaclaw start``: mitmproxy with our addon, in this process.

Design: mitmproxy's own master with options set for one purpose: it listens on loopback only, decrypts LLM hosts only
(``proxy.intercept``), keeps its CA in our own 0700 folder, and stores no flows. *Lean*, the default, loads those of
mitmproxy's addons that have something to do here and leaves the others out, since each of them is asked about every
event of every flow. Everything else is mitmproxy.

Limits: an option of an addon that is left out is refused by name; ``--no-lean`` loads them all. Reading captures
(``-nr``) is mitmdump's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

import click
from mitmproxy import ctx, exceptions, http, options, optmanager
from mitmproxy.addonmanager import AddonManager
from mitmproxy.addons import core, disable_h2c, errorcheck, next_layer, proxyserver, script, tlsconfig
from mitmproxy.addons.save import Save
from mitmproxy.addons.savehar import SaveHar
from mitmproxy.addons.termlog import TermLog
from mitmproxy.master import Master
from mitmproxy.proxy import mode_specs
from mitmproxy.tools.dump import DumpMaster

from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.proxy import hosts
from metaclaw_core.proxy.addon import addons_for_script
from metaclaw_core.proxy.ca import confdir, ensure_ca
from metaclaw_core.proxy.dispatch import DirectAddons
from metaclaw_core.proxy.options import OPTIONS, PREFIX, layer
from metaclaw_core.proxy.startoptions import StartOptions, check_sets, written_down
from metaclaw_core.settings import Settings, home, load_settings, nest, private_dir, skills_settings, typed


def run(chosen: StartOptions) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises MetaClawError with a sentence for what is in the way."""
    os.umask(0o077)  # this process is ours alone: captures (-w) and the CA are nobody else's business
    check_sets(chosen.sets)
    try:
        private_dir(home())
    except OSError as e:
        raise ConfigError(f"{home()} can't be used ({e.strerror}): make it yours, or name another folder with METACLAW_HOME.") from e
    asyncio.run(_serve(chosen))


async def _serve(chosen: StartOptions) -> None:
    master = Lean(options.Options()) if chosen.lean else DumpMaster(options.Options(), with_dumper=False)
    try:
        master.addons.add(*addons_for_script())
        # What writes flows comes last, as it does after a script's addons: it must find them redacted.
        master.addons.chain.sort(key=lambda addon: isinstance(addon, (Save, SaveHar)))
        settings = _configure(master, chosen)
    except exceptions.OptionsError as e:
        raise MetaClawError(str(e).removeprefix("metaclaw: ")) from e
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, master.shutdown)
    logging.getLogger("mitmproxy.proxy.server").setLevel(logging.WARNING)
    port = settings.proxy.port
    click.echo(f"metaclaw listens on 127.0.0.1:{port} (mode {settings.mode}). Let your agent use it:\n  metaclaw run -- COMMAND\n"
               f"or, in its shell or service, the lines of `metaclaw env`, that is at least\n"
               f"  export HTTPS_PROXY=http://127.0.0.1:{port} HTTP_PROXY=http://127.0.0.1:{port} "
               f"NODE_EXTRA_CA_CERTS={Path(master.options.confdir) / 'mitmproxy-ca-cert.pem'}")
    with written_down(home(), chosen):
        await master.run()


class Lean(Master):
    """mitmproxy's master with the addons that a forward proxy for LLM traffic needs."""

    def __init__(self, opts: options.Options) -> None:
        super().__init__(opts)
        self.addons: AddonManager = DirectAddons(self)
        self._termlog_addon = TermLog()
        self.addons.add(  # type: ignore[no-untyped-call]
            self._termlog_addon,
            core.Core(),
            DisableH2C(),
            proxyserver.Proxyserver(),
            script.ScriptLoader(),
            next_layer.NextLayer(),
            TlsConfig(),
            errorcheck.ErrorCheck(),
        )


class TlsConfig(tlsconfig.TlsConfig):
    """mitmproxy's, which for each request makes the name of its CRL anew, to see whether that is what is asked for."""

    _looks_at_all = True

    def configure(self, updated: set[str]) -> None:
        super().configure(updated)  # type: ignore[no-untyped-call]
        self._looks_at_all = any(getattr(ctx.options, name, False) for name in ("emudhra", "emudhra_old"))

    def request(self, flow: http.HTTPFlow) -> None:
        if self._looks_at_all or flow.request.data.path.endswith(b".crl"):
            super().request(flow)


class DisableH2C(disable_h2c.DisableH2C):
    """mitmproxy's, asked only where a request may be one for HTTP/2 in clear text."""

    def request(self, f: http.HTTPFlow) -> None:
        if f.request.data.method == b"PRI" or any(name.lower() == b"upgrade" for name, _ in f.request.headers.fields):
            super().request(f)  # type: ignore[no-untyped-call]


def _configure(master: Master, chosen: StartOptions) -> Settings:
    """Flags and sets onto the master's options; the settings they make. The caller's sets win over what we set."""
    ours = [item for item in chosen.sets if item.startswith(PREFIX)]
    if chosen.mode is not None:
        ours.append(f"{PREFIX}mode={chosen.mode}")
    if chosen.port is not None:
        ours.append(f"{PREFIX}proxy_port={chosen.port}")
    # Before mitmproxy hears of them: it would log what is wrong with a value once more for each try.
    given = [(OPTIONS[name], value) for name, _, value in (item.partition("=") for item in ours) if name in OPTIONS]
    load_settings(*(nest(path, typed(path, value)) for path, value in given))
    _set(master, ours)
    settings = load_settings(layer(master.options))
    _check_skills(settings)
    mitm = [item for item in chosen.sets if not item.startswith(PREFIX)]
    folder = next((Path(item.partition("=")[2]).expanduser() for item in mitm if item.startswith("confdir=")), confdir())
    ensure_ca(folder)
    master.options.update(
        listen_host="127.0.0.1",
        listen_port=settings.proxy.port,
        confdir=str(folder),
        connection_strategy="lazy",
        allow_hosts=hosts.allow_hosts(decrypted_hosts(settings)) if settings.proxy.intercept == "llm" else [],
    )
    _set(master, mitm)
    if chosen.lean:
        _check_lean_modes(master.options)
    for host, port in _addresses(master.options):
        _check_loopback(host)
        _check_free(host, port)
    return settings


def decrypted_hosts(settings: Settings) -> set[str]:
    """The hosts whose TLS `metaclaw start` opens where ``proxy.intercept`` is ``llm``."""
    return {*hosts.PROVIDERS, *hosts.configured_hosts(settings, hosts.agent_config_files(Path.home()))}


def _set(master: Master, items: Iterable[str]) -> None:
    items = list(items)
    for name in dict.fromkeys(item.partition("=")[0] for item in items):
        if name not in master.options:
            raise ConfigError(_unknown(name, list(master.options.keys())))
        given = [item for item in items if item.partition("=")[0] == name]
        choices = optmanager.dump_dicts(master.options, [name])[name]["choices"]
        if choices and (bad := [item for item in given if item.partition("=")[2] not in choices]):
            raise ConfigError(f"--set {bad[0]} is not allowed: {' or '.join(choices)}.")
        try:
            # All values of a name at once: an option that is a list takes them together.
            master.options.set(*given)
        except exceptions.OptionsError as e:
            raise ConfigError(f"--set {name}: {str(e).removeprefix('metaclaw: ')}") from e


def _unknown(name: str, known: list[str]) -> str:
    full, mitmdump = options.Options(), options.Options()
    DumpMaster(full, with_termlog=False, with_dumper=False)
    if name in full:
        return f"--set {name} needs a part of mitmproxy that the lean proxy leaves out: add --no-lean."
    DumpMaster(mitmdump, with_termlog=False)
    if name in mitmdump:
        return f"--set {name} is about printing flows, which metaclaw start does not: run mitmdump with the addon (`metaclaw addon-path`)."
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else " `mitmdump --options` lists mitmproxy's."
    return f"--set {name}: there is no such option.{hint}"


def _check_skills(settings: Settings) -> None:
    skills = skills_settings(settings)
    for key, name in [("skills.dir", skills.dir), *(("skills.extra_dirs", extra) for extra in skills.extra_dirs)]:
        folder = Path(name).expanduser()
        if not folder.exists():
            continue  # it is made with its first skill
        try:
            next(folder.iterdir(), None)
        except OSError as e:
            raise ConfigError(f"{key} = {name} can't be read ({e.strerror}): make it a readable folder or name another.") from e


def _addresses(opts: options.Options) -> list[tuple[str, int]]:
    found = []
    for text in opts.mode:
        mode = mode_specs.ProxyMode.parse(text)
        port = mode.listen_port(opts.listen_port)
        if port is not None:
            found.append((mode.listen_host(opts.listen_host), port))
    return found


def _check_lean_modes(opts: options.Options) -> None:
    for text in opts.mode:
        if isinstance(mode_specs.ProxyMode.parse(text), mode_specs.DnsMode | mode_specs.WireGuardMode):
            raise ConfigError(f"--set mode={text} needs mitmproxy's DNS resolver, which the lean proxy leaves out: add --no-lean.")


def _check_loopback(host: str) -> None:
    with contextlib.suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return
    raise ConfigError(
        f"metaclaw listens on 127.0.0.1 only, not on {host or 'all addresses'}: whoever reaches the proxy could use it. "
        "For other machines run mitmdump with the addon (`metaclaw addon-path`) and its proxyauth."
    )


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            raise ConfigError(
                f"{host}:{port} can't be listened on ({e.strerror}): another program has it. "
                "Another port: metaclaw start --port N, or `metaclaw config proxy.port N`."
            ) from e
