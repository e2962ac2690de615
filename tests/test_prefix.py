"""Common prefix and suffix of two bodies, against the obvious loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.prefix import common_prefix, common_suffix, longest

BODY = st.binary(max_size=60) | st.integers(0, 3).map(lambda n: b"ab" * 8191 * n + b"c" * n)


def naive_prefix(a: bytes, b: bytes) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@given(BODY, BODY, BODY, BODY)
def test_prefix_and_suffix_are_those_of_the_obvious_loop(start, a, b, end):
    one, two = start + a + end, start + b + end
    assert common_prefix(one, two) == naive_prefix(one, two)
    same = naive_prefix(one[::-1], two[::-1])
    assert common_suffix(one, two, len(one)) == same
    assert common_suffix(one, two, len(one), same // 2) == same


def test_the_suffix_stops_at_its_limit():
    assert common_suffix(b"abcabc", b"xbcabc", 3) == 3
    assert common_suffix(b"", b"x", 5) == 0


@given(st.lists(BODY, max_size=5), BODY)
def test_the_longest_prefix_is_that_of_the_obvious_loop(bodies, body):
    lengths = [naive_prefix(other, body) for other in bodies]
    length = max(lengths, default=0)
    assert longest(bodies, body) == (lengths.index(length) if lengths else -1, length)
