from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.proxy.tee import Tee


@given(st.lists(st.binary(min_size=1)))
def test_every_chunk_goes_on_as_the_same_object_and_the_copy_is_whole(chunks):
    tee = Tee(1 << 20)
    assert all(tee(chunk) is chunk for chunk in chunks)
    assert not tee.ended
    assert tee(b"") == b""
    assert tee.ended
    assert tee.body() == b"".join(chunks)
    assert not tee.overflow


def test_past_the_limit_nothing_is_kept_and_everything_still_goes_on():
    tee = Tee(4)
    assert [tee(chunk) for chunk in (b"ab", b"cde", b"f")] == [b"ab", b"cde", b"f"]
    assert tee.overflow
    assert tee.body() == b""


def test_exactly_the_limit_is_kept():
    tee = Tee(4)
    tee(b"abcd")
    assert tee.body() == b"abcd"
    assert not tee.overflow
