from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import json_values

from metaclaw_core.wire.json_array import ObjectSplitter


def split(*chunks: bytes) -> list[bytes]:
    splitter = ObjectSplitter()
    return [found for chunk in chunks for found in splitter.feed(chunk)]


def test_an_object_is_given_when_it_is_closed() -> None:
    splitter = ObjectSplitter()
    assert splitter.feed(b'[{"a": {"b": 1}') == []
    assert splitter.feed(b'},\r\n{"c"') == [b'{"a": {"b": 1}}']
    assert splitter.feed(b": [2]}") == [b'{"c": [2]}']
    assert not splitter.closed
    assert splitter.feed(b"\n]") == []
    assert splitter.closed


def test_brackets_and_quotes_inside_strings_do_not_count() -> None:
    assert split(b'[{"a": "}', b"\\", b'"]{"}]') == [b'{"a": "}\\"]{"}']


def test_objects_without_an_array_are_given_too() -> None:
    assert split(b'{"a": 1}') == [b'{"a": 1}']
    assert split(b'{"a": 1}\n{"b": [{}]}') == [b'{"a": 1}', b'{"b": [{}]}']


@pytest.mark.parametrize("data", [b"]", b"[]]]{", b"}{", b"\\", b'"[{'])
def test_what_is_no_json_gives_nothing(data: bytes) -> None:
    assert split(data) == []


@given(st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), max_size=4), st.integers(1, 9))
def test_any_chunking_gives_the_objects(objects: list[dict[str, Any]], size: int) -> None:
    data = json.dumps(objects, ensure_ascii=False).encode("utf-8", "surrogatepass")
    found = split(*(data[i : i + size] for i in range(0, len(data), size)))
    assert [one.decode("utf-8", "surrogatepass") for one in found] == [
        json.dumps(o, ensure_ascii=False) for o in objects
    ]
