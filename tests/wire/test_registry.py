from __future__ import annotations

import logging
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from metaclaw_core import wire
from metaclaw_core.errors import WireError
from metaclaw_core.wire.base import Route


class Stranger:
    name = "stranger"

    def route(self, method: str, path: str) -> Route | None:
        return Route(self.name) if path == "/stranger" else None


class Liar(Stranger):
    name = "somebody_else"


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of another package, with two dialects."""
    module = ModuleType("a_strange_package")
    module.STRANGER, module.LIAR = Stranger(), Liar()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_strange_package", module)
    return "a_strange_package"


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, wire.GROUP)


def test_the_five_built_ins_are_there_under_their_own_names():
    names = ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama")
    assert tuple(d.name for d in wire.DIALECTS)[:5] == names
    assert [wire.by_name(name).name for name in names] == list(names)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "openai_chat"),
        ("/openai/v1/chat/completions?api-version=1", "openai_chat"),
        ("/openai/deployments/gpt/chat/completions?api-version=2024-10-21", "openai_chat"),
        ("/v1/responses", "openai_responses"),
        ("/backend-api/codex/responses", "openai_responses"),
        ("/v1/messages", "anthropic"),
        ("/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse", "gemini"),
        ("/api/chat", "ollama"),
    ],
)
def test_a_path_finds_its_dialect_below_any_base(path: str, name: str):
    found = wire.find_route("POST", path)
    assert found is not None
    assert (found[0].name, found[1].dialect) == (name, name)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/embeddings",
        "/v1/models",
        "/v1/completions",
        "/v1/messages/count_tokens",
        "/v1/responses/resp_1/cancel",
        "/v1/responses/compact",
        "/simple/responses-lib/",
        "/xchat/completions/more",
        "/",
        "",
        "*",
    ],
)
def test_other_paths_are_no_llm_calls(path: str):
    assert wire.find_route("POST", path) is None


def test_a_get_is_no_llm_call_but_its_websocket_upgrade_is():
    assert wire.find_route("GET", "/v1/responses") is None
    upgrade = wire.websocket_route("/v1/responses?model=gpt-5.5")
    assert upgrade is not None
    assert upgrade[1] == Route("openai_responses")


@pytest.mark.parametrize(
    "path", ["/v1/realtime", "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"]
)
def test_a_protocol_that_has_only_websockets_is_left_alone(path: str):
    assert wire.websocket_route(path) is None


def test_an_unknown_name_says_what_to_do():
    with pytest.raises(WireError, match=r"^dialect 'klingon' is not known; install the package that provides it$"):
        wire.by_name("klingon")


def test_a_stranger_is_loaded_after_the_built_ins(strangers: str):
    found = wire.load([*wire.BUILT_IN, point("stranger", f"{strangers}:STRANGER")])
    assert [d.name for d in found] == ["openai_chat", "openai_responses", "anthropic", "gemini", "ollama", "stranger"]
    assert found[-1].route("POST", "/stranger") == Route("stranger")


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("anthropic", "{}:STRANGER", "the name is taken"),
        ("honest", "{}:LIAR", "it does not call itself so"),
        ("broken", "{}:MISSING", "can't be loaded"),
        ("absent", "{}_absent:X", "can't be loaded"),
    ],
)
def test_a_bad_stranger_is_reported_and_left_out(
    strangers: str, caplog: pytest.LogCaptureFixture, name: str, target: str, reason: str
):
    with caplog.at_level(logging.WARNING):
        found = wire.load([point(name, target.format(strangers))])
    assert len(found) == 5
    assert [reason in r.message for r in caplog.records] == [True]


def test_an_installed_package_declares_the_built_ins_like_a_stranger_would():
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][wire.GROUP] == {
        "openai_chat": "metaclaw_core.wire.openai_chat:OPENAI_CHAT",
        "openai_responses": "metaclaw_core.wire.openai_responses:OPENAI_RESPONSES",
        "anthropic": "metaclaw_core.wire.anthropic:ANTHROPIC",
        "gemini": "metaclaw_core.wire.gemini:GEMINI",
        "ollama": "metaclaw_core.wire.ollama:OLLAMA",
    }
    assert {p.name: p.value for p in wire.BUILT_IN} == project["entry-points"][wire.GROUP]


def test_a_name_that_the_module_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'NOPE'"):
        wire.NOPE  # noqa: B018
