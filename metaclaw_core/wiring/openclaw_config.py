"""OpenClaw's own proxy setting, ``proxy.proxyUrl`` in openclaw.json: put in and taken out as text.

Design: one member goes in as the first of its object and comes out by its value: it is ours only as long as it is
what we wrote. The result is parsed again and compared before anybody writes it. What can't be edited safely is refused
with a sentence: another proxy, a setting that is switched off, included files, a key that is there twice.

Limits: the CA can't be set here. Node reads NODE_EXTRA_CA_CERTS before it starts, so it must come from the environment.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from metaclaw_core.errors import ConfigError
from metaclaw_core.wiring.json5 import Json5Error, Member, Node, insert_first, parse, plain, remove

_BY_HAND = "Take it out by hand: openclaw config unset proxy.proxyUrl"


def _other_way(url: str) -> str:
    return f"Use `metaclaw wire openclaw` without --via-config, or set it by hand: openclaw config set proxy.proxyUrl {url}"


@dataclass(frozen=True, slots=True)
class Wired:
    text: str
    made_section: bool  # `proxy` was not there before


def set_proxy(text: str, url: str, name: str = "openclaw.json") -> Wired:
    """`text` with ``proxy.proxyUrl`` = `url`. Raises ConfigError where that isn't safe; `name` is for the sentence."""
    remedy = _other_way(url)
    root = _root(text, name, remedy)
    section = _section(root, name, remedy)
    entry = json.dumps(url)
    if section is None:
        made = insert_first(text, root, f'"proxy": {{"proxyUrl": {entry}}}')
        return Wired(_proven(made, [("proxy", [("proxyUrl", ("string", url))]), *_plain(root)], name, remedy), made_section=True)
    if _word(section, "enabled") == "false":
        raise ConfigError(f"{name} switches OpenClaw's proxy off (proxy.enabled: false): remove that first, it was somebody's decision.")
    known = section.value.named("proxyUrl")
    if len(known) > 1:
        raise _refuse(name, "holds proxy.proxyUrl twice", remedy)
    if known:
        if known[0].value.kind == "string" and known[0].value.text == url:
            return Wired(text, made_section=False)
        raise ConfigError(
            f"{name} already names another proxy ({_shown(known[0].value)}), and MetaClaw does not take its place. "
            "Let MetaClaw go through it instead: metaclaw start --set mode=upstream:URL, and remove proxy.proxyUrl."
        )
    made = insert_first(text, section.value, f'"proxyUrl": {entry}')
    wanted = [
        (key, [("proxyUrl", ("string", url)), *_plain(section.value)] if key == "proxy" else value) for key, value in _plain(root)
    ]
    return Wired(_proven(made, wanted, name, remedy), made_section=False)


def unset_proxy(text: str, url: str, *, made_section: bool, name: str = "openclaw.json") -> str:
    """`text` without our ``proxy.proxyUrl``; as it is where the value is not `url` any more. A `proxy` that we made
    goes too if nothing else is in it by now. Raises ConfigError where that isn't safe."""
    root = _root(text, name, _BY_HAND)
    for section in root.named("proxy"):
        if section.value.kind != "object":
            continue
        for member in section.value.named("proxyUrl"):
            if member.value.kind != "string" or member.value.text != url:
                continue
            rest = [entry for entry in section.value.members if entry is not member]
            if made_section and not rest and "//" not in (body := _inside(text, section, member)) and "/*" not in body:
                wanted = [(m.key, plain(m.value)) for m in root.members if m is not section]
                return _proven(remove(text, root, section), wanted, name, _BY_HAND)
            wanted = [
                (m.key, [(e.key, plain(e.value)) for e in rest] if m is section else plain(m.value)) for m in root.members
            ]
            return _proven(remove(text, section.value, member), wanted, name, _BY_HAND)
    return text


def proxy_of(text: str) -> str | None:
    """What ``proxy.proxyUrl`` says, if it can be told and is not switched off."""
    try:
        root = parse(text)
    except Json5Error:
        return None
    for section in root.named("proxy"):
        if section.value.kind == "object" and _word(section, "enabled") != "false":
            for member in section.value.named("proxyUrl"):
                return member.value.text if member.value.kind == "string" else None
    return None


def timeouts_of(text: str) -> dict[str, float]:
    """``models.providers.<id>.timeoutSeconds`` where set, by provider; {} where the file can't be read."""
    try:
        root = parse(text)
    except Json5Error:
        return {}
    found: dict[str, float] = {}
    for models in root.named("models"):
        for providers in models.value.named("providers"):
            for provider in providers.value.members:
                for member in provider.value.named("timeoutSeconds"):
                    if member.value.kind == "word" and re.fullmatch(r"\d+(\.\d*)?", member.value.text):
                        found[provider.key] = float(member.value.text)
    return found


def _inside(text: str, section: Member, member: Member) -> str:
    """What stands in `section` around its only member."""
    return text[section.value.start : member.start] + text[member.end : section.value.end]


def _root(text: str, name: str, remedy: str) -> Node:
    try:
        root = parse(text)
    except Json5Error as e:
        raise ConfigError(f"{name} can't be read ({e}), so it is left alone. {remedy}") from e
    if root.kind != "object":
        raise _refuse(name, "holds no object", remedy)
    return root


def _section(root: Node, name: str, remedy: str) -> Member | None:
    found = root.named("proxy")
    if root.named("$include") or any(member.value.named("$include") for member in found):
        raise _refuse(name, "includes other files, and which one rules the proxy can't be told", remedy)
    if len(found) > 1:
        raise _refuse(name, "holds `proxy` twice", remedy)
    if found and found[0].value.kind != "object":
        raise _refuse(name, "has a `proxy` that is no object", remedy)
    return found[0] if found else None


def _refuse(name: str, why: str, remedy: str) -> ConfigError:
    return ConfigError(f"{name} {why}, so it is left alone. {remedy}")


def _word(section: Member, key: str) -> str | None:
    return next((m.value.text for m in section.value.named(key) if m.value.kind == "word"), None)


def _plain(node: Node) -> list[tuple[str, object]]:
    return [(member.key, plain(member.value)) for member in node.members]


def _proven(text: str, wanted: object, name: str, remedy: str) -> str:
    """The edited text, if it says exactly what was wanted."""
    try:
        found = plain(parse(text))
    except Json5Error:
        found = None
    if found != wanted:
        raise _refuse(name, "is written in a way that can't be changed without touching more", remedy)
    return text


def _shown(node: Node) -> str:
    return re.sub(r"//[^/@]*@", "//***@", node.text) if node.kind == "string" else node.kind
