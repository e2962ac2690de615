"""``metaclaw config``: show the settings and where each comes from, print one, change one.

Design: a change goes through the settings model before it goes to the file, and through `configfile`, which leaves
every other byte of the file alone. What a higher layer overrides is said, because a change that has no effect
looks like a bug. Secrets are masked wherever they are shown; ``--reveal`` prints one.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from metaclaw_core import configfile
from metaclaw_core.cli.output import json_line
from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import (
    ENVIRONMENT,
    Settings,
    check_values,
    config_file,
    field_of,
    home,
    is_secret,
    leaves,
    load_settings,
    nest,
    settings_and_sources,
    typed,
)

_PASSWORD_IN_URL = re.compile(r"(://[^:/@\s]*:)[^@/\s]+@")
# Read once when the proxy starts; everything else follows a reload.
_AT_START = {"mode", "proxy.port", "proxy.intercept", "proxy.hosts"}


@click.command("config")
@click.argument("key", required=False)
@click.argument("value", required=False)
@click.option("--unset", is_flag=True, help="Take KEY out of the file: its default counts again.")
@click.option("--reveal", is_flag=True, help="Print a secret as it is.")
@click.option("--json", "as_json", is_flag=True, help="JSON: for show one object of all keys, for KEY its value.")
def command(key: str | None, value: str | None, unset: bool, reveal: bool, as_json: bool) -> None:
    """Show or change settings.

    \b
    metaclaw config show             all keys, their values and where each comes from
    metaclaw config KEY              print one value
    metaclaw config KEY VALUE        change it in config.yaml; - reads VALUE from standard input
    metaclaw config KEY --unset      take it out of config.yaml

    Lists are written as [a, b] or a,b.
    """
    if key is None or (key == "show" and value is None and not unset):
        _show(as_json)
        return
    path = tuple(key.split("."))
    if unset:
        _unset(path, value)
    elif value is None:
        _print(path, reveal=reveal, as_json=as_json)
    else:
        _set(path, value)


def _show(as_json: bool) -> None:
    settings, sources = settings_and_sources()
    found = {path: (masked(path, value_of(settings, path)), _source(sources, path)) for path in leaves()}
    if as_json:
        json_line({".".join(path): {"value": value, "source": source} for path, (value, source) in found.items()})
        return
    file = config_file()
    click.echo(f"# {file}{'' if file.exists() else ' (not there yet: `metaclaw setup` writes it)'}")
    names = {path: ".".join(path) for path in found}
    lines = {path: f"{names[path]:<{max(map(len, names.values()))}} = {_text(value)}" for path, (value, _) in found.items()}
    width = min(max(map(len, lines.values())), 70)
    for path, (_, source) in found.items():
        click.echo(f"{lines[path]:<{width}}  # {source}" if source != "default" else lines[path])


def _print(path: configfile.Key, *, reveal: bool, as_json: bool) -> None:
    if path in {p[:n] for p in leaves() for n in range(1, len(p))}:
        raise ConfigError(f"{path[0]} is a section: name one key, as in {'.'.join(_first_key(path))}, or use `metaclaw config show`.")
    field_of(path)
    value = value_of(load_settings(), path)
    shown = value if reveal else masked(path, value)
    if as_json:
        from metaclaw_core.wire.jsonio import dumps

        click.echo(dumps(list(shown) if isinstance(shown, tuple) else shown))
    else:
        click.echo(_text(shown) if not isinstance(shown, str) else shown)


def _set(path: configfile.Key, text: str) -> None:
    field_of(path)
    if text == "-":
        prompted = sys.stdin.isatty()
        text = click.prompt(".".join(path), hide_input=is_secret(path)) if prompted else sys.stdin.readline().rstrip("\r\n")
    value = typed(path, text)
    checked = value_of(check_values(nest(path, value), "the command line"), path)
    configfile.write_text(configfile.set_value(configfile.read_text(), path, _plain(checked)))
    click.echo(f"{'.'.join(path)} = {_text(masked(path, checked))}")
    _after(path)


def _unset(path: configfile.Key, value: str | None) -> None:
    if value is not None:
        raise ConfigError("--unset takes a key and no value.")
    try:
        text = configfile.unset(configfile.read_text(), path)
    except KeyError:
        field_of(path)  # an unknown key is taken out of the file too, but has to be in it
        raise ConfigError(f"{'.'.join(path)} is not set in {config_file()}.") from None
    configfile.write_text(text)
    click.echo(f"{'.'.join(path)} is not set any more in {config_file()}.")
    if path in leaves():
        _after(path)


def _after(path: configfile.Key) -> None:
    """Say what stands between the new value and its effect."""
    try:
        _, sources = settings_and_sources()
    except ConfigError as e:
        click.echo(f"metaclaw: the settings can't be used yet: {e}", err=True)
        return
    if sources.get(path) == ENVIRONMENT:
        click.echo(f"But METACLAW_{'_'.join(path).upper()} in the environment wins over the file.", err=True)
    from metaclaw_core.proxy.control import call, running_proxies

    for proxy in running_proxies(home()):
        if ".".join(path) in _AT_START:
            click.echo(f"The running proxy (pid {proxy.pid}) uses it after `metaclaw restart`.")
            continue
        try:
            problem = call(proxy, "reload").get("error")
        except OSError as e:
            problem = f"it does not answer ({e})"
        click.echo(
            f"The running proxy (pid {proxy.pid}) did not take it: {problem}"
            if problem
            else f"The running proxy (pid {proxy.pid}) has read it."
        )


def value_of(settings: Settings, path: configfile.Key) -> Any:
    node: Any = settings
    for name in path:
        node = getattr(node, name)
    return node


def masked(path: configfile.Key, value: Any) -> Any:
    """What may be shown of a value: of a secret its last four characters."""
    if not isinstance(value, str) or not value:
        return value
    if is_secret(path):
        return f"***{value[-4:]}" if len(value) >= 12 else "***"
    return _PASSWORD_IN_URL.sub(r"\1***@", value)


def _source(sources: dict[configfile.Key, str], path: configfile.Key) -> str:
    source = sources.get(path)
    if source is None:
        return "default"
    return {str(config_file()): "file", ENVIRONMENT: "environment"}.get(source, source)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    """A value as one would write it in the file."""
    if value == "":
        return '""'
    import yaml

    written = yaml.safe_dump(_plain(value), default_flow_style=True, allow_unicode=True, width=1 << 20)
    return written.removesuffix("\n").removesuffix("\n...")


def _first_key(section: configfile.Key) -> configfile.Key:
    return next(path for path in leaves() if path[: len(section)] == section)
