from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.skills.tokens import MAX_QUERY_CHARS, capped, pairs, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pull-Request_review / PULL.REQUEST", ["pull", "request", "review", "pull", "request"]),
        ("the reviews I reviewed while reviewing policies", ["review", "review", "review", "policy"]),
        ("C++ and C# on .NET, not C", ["c++", "c#", ".net"]),
        ("issue#12 page 3", ["issue", "12", "page", "3"]),
        ("审查代码", ["审查", "查代", "代码"]),
        ("用 pandas清洗CSV", ["用", "panda", "清洗", "csv"]),
        ("코드 검토", ["코드", "검토"]),
        ("契約書を確認", ["契約", "約書", "書を", "を確", "確認"]),
        ("ありがとうございます", []),
        ("Straße über Größe", ["straße", "größe"]),
        ("", []),
    ],
)
def test_text_becomes_the_terms_that_index_and_query_share(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_neighbours_become_pairs_that_no_word_equals() -> None:
    assert pairs(["merge", "conflict", "file"]) == ["merge conflict", "conflict file"]
    assert pairs(["merge"]) == []


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = "begin " + "x" * 10_000 + " end"
    assert capped(text).startswith("begin x")
    assert capped(text).endswith("x end")
    assert len(capped(text)) == MAX_QUERY_CHARS + 1
    assert capped("short") == "short"


@given(st.text())
def test_any_text_has_terms_without_white_space(text: str) -> None:
    for term in words(text):
        assert term
        assert not any(c.isspace() for c in term)
