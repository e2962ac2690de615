from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.errors import WireError
from metaclaw_core.wire import jsonio

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def test_a_long_integer_and_a_lone_surrogate_survive_the_round_trip():
    text = '{"n":12345678901234567890123,"s":"\\ud800"}'
    assert jsonio.dumps(jsonio.loads(text.encode(), "body")) == text


def test_output_is_ascii_in_the_given_key_order():
    assert jsonio.dumps({"b": "é", "a": [1, None]}) == '{"b":"\\u00e9","a":[1,null]}'


def test_canonical_text_sorts_keys_at_each_level():
    assert jsonio.canonical({"b": 1, "a": {"d": 2, "c": 3}}) == '{"a":{"c":3,"d":2},"b":1}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_the_encodings_of_json_are_read(encoding: str):
    assert jsonio.loads('{"a":"é"}'.encode(encoding), "body") == {"a": "é"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "body is not JSON: Expecting value at 0"),
        (b"{} x", "body is not JSON: Extra data at 3"),
        (b'{"a": "\xff"}', "body is not valid UTF-8 (byte 7)"),
        (b"[" * 200_000, "body is nested too deeply"),
    ],
)
def test_what_is_no_json_is_a_wire_error_that_says_where(data: bytes, message: str):
    with pytest.raises(WireError) as caught:
        jsonio.loads(data, "body")
    assert str(caught.value) == message


def test_an_integer_that_python_refuses_is_a_wire_error():
    with pytest.raises(WireError, match="not JSON that can be held"):
        jsonio.loads(b"1" * 5_000, "body")


def test_an_object_is_asked_for_by_name():
    assert jsonio.loads_object(b'{"a":1}', "body") == {"a": 1}
    with pytest.raises(WireError, match=r"^body is JSON, but list and not an object$"):
        jsonio.loads_object(b"[]", "body")


@pytest.mark.parametrize("write", [jsonio.dumps, jsonio.canonical])
def test_a_value_nested_too_deeply_to_write_is_a_wire_error(write):
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(WireError, match="nested too deeply"):
        write(deep)


@given(JSON)
def test_what_is_written_is_read_back_equal(value: object):
    assert jsonio.loads(jsonio.dumps(value), "body") == value
    assert jsonio.loads(jsonio.canonical(value).encode(), "body") == value


@given(st.binary(max_size=40) | st.text(max_size=40))
def test_any_input_is_json_or_a_wire_error(data: bytes | str):
    try:
        value = jsonio.loads(data, "body")
    except WireError:
        return
    assert jsonio.dumps(value).isascii()
