"""One member goes in and comes out of JSON5, and no other byte moves."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json5_texts import objects

from metaclaw_core.wiring.json5 import Json5Error, insert_first, parse, plain, remove

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

@given(_JSON, st.sampled_from([None, 2]))
def test_json_is_read_as_json(value, indent):
    def of(found):
        if isinstance(found, dict):
            return [(key, of(entry)) for key, entry in found.items()]
        if isinstance(found, list):
            return tuple(of(entry) for entry in found)
        return ("string", found) if isinstance(found, str) else ("word", json.dumps(found))

    assert plain(parse(json.dumps(value, indent=indent, ensure_ascii=False))) == of(value)


@given(objects())
def test_what_was_put_in_and_taken_out_left_no_trace(text):
    with_it = insert_first(text, parse(text), '"ours": {"x": "y"}')
    root = parse(with_it)
    assert plain(root)[0] == ("ours", [("x", ("string", "y"))])
    assert plain(root)[1:] == plain(parse(text))
    assert remove(with_it, root, root.members[0]) == text


@given(objects(), st.data())
def test_any_member_can_be_taken_out_and_the_rest_stays_as_it_is(text, data):
    root = parse(text)
    if not root.members:
        return
    place = data.draw(st.integers(0, len(root.members) - 1))
    rest = [entry for i, entry in enumerate(plain(root)) if i != place]
    without = remove(text, root, root.members[place])
    assert plain(parse(without)) == rest
    for note in ("// a note, {", '/* two\n lines: "x" */'):
        inside = text[root.members[place].start : root.members[place].end].count(note)
        assert without.count(note) >= text.count(note) - inside - 2  # what stood inside the member itself


@given(st.text(alphabet="{}[]:,\"'\\/*ab01 \n-.", max_size=30))
def test_no_text_breaks_the_reader(text):
    with contextlib.suppress(Json5Error):
        assert parse(text).end <= len(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a value is missing in line 1"),
        ("{\n  a 1}", "a colon is missing after 'a' in line 2"),
        ("{a: 1\n b: 2}", "a comma is missing in line 2"),
        ("{a: 01}", "a value is missing in line 1"),
        ("{a: 'x\ny'}", "a string does not end in line 1"),
        ("{} {}", "nothing more was expected in line 1"),
        ("{,}", "a key is missing in line 1"),
        ("[" * 200, "more than 100 levels in line 1"),
        ("{a: '\\u12'}", "an escape is not valid in line 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text, problem):
    with pytest.raises(Json5Error) as e:
        parse(text)
    assert str(e.value) == problem
