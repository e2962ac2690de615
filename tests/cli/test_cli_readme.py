"""What README.md says exists: commands, options, settings with their defaults, scripts, files, links."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from metaclaw_core.cli.main import group
from metaclaw_core.settings import Settings, leaves

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))
KEYS = {".".join(path) for path in leaves()}
SECTIONS = {path[0] for path in leaves() if len(path) > 1}


def _code() -> list[str]:
    """Inline code, and what is typed in console blocks."""
    fenced = re.findall(r"^```console\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    typed = [line.removeprefix("$ ") for block in fenced for line in block.splitlines() if line.startswith("$ ")]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE))
    return typed + inline


def _commands() -> list[str]:
    found: dict[str, None] = {}
    for code in _code():
        for part in re.findall(r"(?:^|\$\()(metaclaw .+)", code.replace("…", "").replace('"$(', "$(").removesuffix(')"')):
            words = part.split(" ")
            for choice in words[2].split("|") if len(words) > 2 and "|" in words[2] else [None]:
                found[" ".join(words if choice is None else [*words[:2], choice, *words[3:]])] = None
    return list(found)


def _walk(words: list[str]) -> Iterator[tuple[click.Command, list[str]]]:
    """The commands along `words`, with the names that led there."""
    command: click.Command = group
    names: list[str] = []
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if words[0].isupper():  # `metaclaw COMMAND --help`
            break
        names.append(words[0])
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None, f"README: there is no metaclaw {' '.join(names)}"
        command = found
        yield command, list(names)


@pytest.mark.parametrize("line", _commands())
def test_each_command_of_the_readme_exists_with_its_options_and_some_test_runs_it(line):
    words = shlex.split(line)[1:]
    known = {"--help", "--version"}
    names: list[str] = []
    command: click.Command = group
    for command, names in _walk(words):  # noqa: B007 - the last one counts
        pass
    known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if "--" in words:
        words = words[: words.index("--")]
    unknown = [word for word in words if word.startswith("-") and word not in known]
    assert not unknown, f"README: metaclaw {' '.join(names)} has no {unknown}"
    if names:
        spoken = r",\s*".join(f'"{name}"' for name in names)
        alone = rf'(cli|run)\("{names[-1]}"'  # by a test that has the group at hand
        assert re.search(rf"[(,\[]\s*{spoken}\s*[,)\]]|{alone}", TESTS), f"no test runs metaclaw {' '.join(names)}"


def test_the_list_of_commands_is_what_the_help_says():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.generated(README) == README, "README.md is not up to date: .venv/bin/python scripts/readme.py"


def _rows() -> list[list[str]]:
    tables = [part.partition("\n\n")[0] for part in README.split("| key | default | |\n")[1:]]
    lines = [line for table in tables for line in table.splitlines()[1:]]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_each_setting_of_the_readme_exists():
    named = {code for code in _code() if re.fullmatch(rf"({'|'.join(SECTIONS)})\.[\w*]+(\.\w+)?", code)}
    assert len(named) > 10
    assert {name for name in named if name not in KEYS and not (name.endswith(".*") and name[:-2] in SECTIONS)} == set()
    variables = set(re.findall(r"\bMETACLAW_[A-Z_]*[A-Z]\b", README))
    known = {"METACLAW_" + key.replace(".", "_").upper() for key in KEYS}
    assert {name for name in variables - known if name not in ("METACLAW_HOME",) and not re.search(rf"{name}\b", (ROOT / "scripts/test").read_text())} == set()


def test_the_defaults_of_the_table_are_those_of_the_model():
    said = {}
    for keys, defaults, _ in _rows():
        for key, default in zip(re.findall(r"`([^`]+)`", keys), defaults.split(", ") if defaults else [], strict=False):
            said[key] = default
    assert len(said) >= 15
    model = Settings().model_dump(mode="json")
    for key, default in said.items():
        value = model
        for name in key.split("."):
            value = value[name]
        written = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        assert default.replace(",", "") == written, key
    silent = {key for keys, defaults, _ in _rows() if not defaults for key in re.findall(r"`([^`]+)`", keys)} - {"llm.*"}
    for key in silent:
        section, name = key.split(".")
        assert model[section][name] == "", key


def test_each_path_of_the_readme_is_there():
    paths = {code.split(" ")[0] for code in _code() if re.match(r"(scripts|metaclaw_core|addons|skills|docs|tests)/", code)}
    assert len(paths) > 10
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_each_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    broken = [
        link
        for link in links
        if not link.startswith("https://") and not (link[1:] in anchors if link.startswith("#") else (ROOT / link).is_file())
    ]
    assert broken == []
    assert links.count("docs/screenshots/session.png") == links.count("docs/screenshots/sessions.png") == 1
