"""Edits of ``config.yaml`` that leave every other byte as its owner wrote it.

Design: the place of a key is found by the marks of PyYAML's parser, the value alone is replaced in the text, and the
result counts only if it parses to exactly the old values with this one changed: found by position, proven by parsing.
Comments, order, quotes and indentation of everything else are untouched. (ruamel.yaml's round trip was tried: it puts
a new key below the comment of the next section, and forgets that comment when a key above it is removed.)

Limits: keys are one or two names deep, as in the settings model. A file with anchors, or several documents, may hold
a place that can't be proven; then the change is refused and nothing is written. Values are written on one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import yaml

from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import config_file, is_secret, nest, private_dir
from metaclaw_core.skills.files import write_atomic

type Key = tuple[str, ...]


def read_text() -> str:
    """The file's text; empty if there is none. Raises ConfigError."""
    path = config_file()
    try:
        return path.read_bytes().decode()  # as bytes, so that the ends of lines stay what they are
    except FileNotFoundError:
        return ""
    except OSError as e:
        raise ConfigError(f"{path} can't be read ({e.strerror}): make it yours, or name another folder with METACLAW_HOME.") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text: {e}.") from e


def write_text(text: str) -> None:
    """Replace the file in one step, readable by its owner only. Raises ConfigError."""
    path = config_file()
    try:
        private_dir(path.parent)
        # A link is followed: people keep their configuration in a repository and link it here.
        write_atomic(path.resolve(), text.encode())
    except OSError as e:
        raise ConfigError(f"{path} can't be written ({e.strerror}): make it yours, or name another folder with METACLAW_HOME.") from e


def values_of(text: str) -> dict[str, Any]:
    """The keys and values of the text. Raises ConfigError."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{config_file()} is not valid YAML{where}: {getattr(e, 'problem', e)}. Mend it, or move it away: `metaclaw setup` writes a new one.") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{config_file()} must hold keys and values, not a {type(values).__name__}.")
    unshared: dict[str, Any] = _unshared(values)
    return unshared


def _unshared(node: Any) -> Any:
    """A copy in which an anchor and its aliases are things of their own, so that changing one is not changing all."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def lookup(values: Mapping[str, Any], path: Key) -> Any:
    """The value of a key. Raises KeyError where it is not set."""
    node: Any = values
    for name in path:
        if not isinstance(node, Mapping):
            raise KeyError(name)
        node = node[name]
    return node


def set_value(text: str, path: Key, value: Any) -> str:
    """`text` with the key set to `value`. Raises ConfigError if that can't be done without touching more."""
    wanted = values_of(text)
    _put(wanted, path, value)
    return _proven(_set(text, path, value), wanted, path, value)


def unset(text: str, path: Key) -> str:
    """`text` without the key; a section that would be empty goes too. Raises ConfigError, KeyError if it isn't set."""
    wanted = values_of(text)
    lookup(wanted, path)
    if len(path) > 1 and len(lookup(wanted, path[:-1])) == 1:
        path = path[:-1]
    parent = lookup(wanted, path[:-1]) if path[:-1] else wanted
    del parent[path[-1]]
    return _proven(_unset(text, path), wanted, path, None)


def _proven(text: str | None, wanted: dict[str, Any], path: Key, value: Any) -> str:
    found: object = None
    if text is not None:
        with contextlib.suppress(ConfigError):
            found = values_of(text)
    if text is None or found != wanted:
        shown = "***" if is_secret(path) else _flow(value)
        raise ConfigError(
            f"{config_file()} is written in a way that `metaclaw config` can't change without touching more: "
            f"set {'.'.join(path)} (to {shown}) by hand."
        )
    return text


def _put(values: dict[str, Any], path: Key, value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value


def _flow(value: Any) -> str:
    """`value` on one line, quoted so that it may also stand inside ``{…}``."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("\n").removeprefix("[").removesuffix("]")


def _set(text: str, path: Key, value: Any) -> str | None:
    root = _compose(text)
    if root is None or not root.value:
        return _appended(text, yaml_block(path, value))
    node = root
    for depth, name in enumerate(path):
        found = _child(node, name)
        if found is None:
            if depth == 0:
                return _appended(text, yaml_block(path, value))
            return _inserted(text, node, path[depth:], value)
        key, child = found
        if depth == len(path) - 1:
            return _replaced(text, key, child, _flow(value))
        if not isinstance(child, yaml.MappingNode):  # `llm:` with nothing, or null
            return _replaced(text, key, child, _flow(nest(path[depth + 1 :], value)))
        node = child
    return None


def _unset(text: str, path: Key) -> str | None:
    node: yaml.Node | None = _compose(text)
    for name in path[:-1]:
        found = _child(node, name)
        if found is None:
            return None
        node = found[1]
    found = _child(node, path[-1])
    if found is None or node is None:
        return None
    key, child = found
    if isinstance(node, yaml.MappingNode) and node.flow_style:
        rest = {k.value: yaml.safe_load(yaml.serialize(v)) for k, v in node.value if k is not key}
        return text[: node.start_mark.index] + _flow(rest) + text[node.end_mark.index :]
    start = text.rfind("\n", 0, key.start_mark.index) + 1
    end = _end(child)
    if not text[:end].endswith("\n"):  # a block scalar ends at the start of the next line
        end = text.find("\n", end) + 1 or len(text)
    return text[:start] + text[end:]


def yaml_block(path: Key, value: Any) -> str:
    """One key on lines of its own: ``llm:\\n  provider: kimi\\n``."""
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(path)]
    return "\n".join(lines) + f" {_flow(value)}\n"


def _compose(text: str) -> yaml.MappingNode | None:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return node if isinstance(node, yaml.MappingNode) else None


def _child(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((k, v) for k, v in node.value if k.value == name), None)


def _end(node: yaml.Node) -> int:
    """Where the last thing written of a node ends; a block's own mark lies behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _appended(text: str, block: str) -> str:
    if text and not text.endswith("\n"):
        text += "\n"
    return text + block


def _inserted(text: str, section: yaml.MappingNode, path: Key, value: Any) -> str:
    """A new key at the end of a section that has others."""
    if section.flow_style:
        old = values_of(text[section.start_mark.index : section.end_mark.index])
        _put(old, path, value)
        return text[: section.start_mark.index] + _flow(old) + text[section.end_mark.index :]
    end = _end(section)
    if not text[:end].endswith("\n"):
        line_end = text.find("\n", end)
        if line_end < 0:
            text, line_end = text + "\n", len(text)
        end = line_end + 1
    column = section.value[0][0].start_mark.column
    block = "".join(" " * column + line + "\n" for line in yaml_block(path, value).splitlines())
    return text[:end] + block + text[end:]


def _replaced(text: str, key: yaml.Node, old: yaml.Node, new: str) -> str:
    start, end = old.start_mark.index, _end(old)
    if start == end:  # nothing is written: `key:`
        colon = text.index(":", key.end_mark.index) + 1
        return f"{text[:colon]} {new}{text[colon:]}"
    if text[:end].endswith("\n"):
        new += "\n"
    return text[:start] + new + text[end:]
