"""Where in a request the human's texts stand, on real traffic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaclaw_core.agents import identify
from metaclaw_core.agents.base import hints_from_headers
from metaclaw_core.model import Role
from metaclaw_core.wire import find_route

CAPTURES = sorted(path.stem for path in (Path(__file__).parents[1] / "captures").glob("*.mitm"))


@pytest.mark.parametrize("name", CAPTURES)
def test_each_text_of_a_human_is_in_the_message_at_its_place(name: str, capture: Callable[[str], list[Any]]) -> None:
    texts = 0
    for flow in capture(name):
        found = find_route(flow.request.method, flow.request.path)
        if found is None:
            continue
        request = found[0].parse_request(flow.request.get_content(strict=False) or b"", flow.request.path)
        identity = identify(request, hints_from_headers(flow.request.headers))
        assert len(identity.human_at) == len(identity.human_texts)
        assert list(identity.human_at) == sorted(set(identity.human_at))
        for text, at in zip(identity.human_texts, identity.human_at, strict=True):
            assert request.messages[at].role is Role.USER
            assert text in request.messages[at].text
            texts += 1
    assert texts > 0 or name.startswith("heartbeat")
