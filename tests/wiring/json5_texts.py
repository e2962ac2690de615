"""JSON5 as people write it: comments, blanks of all kinds, trailing commas."""

from __future__ import annotations

from hypothesis import strategies as st

_BLANKS = st.sampled_from(["", " ", "\n  ", "\r\n\t", "\u00a0", " // a note, {\n", "/* two\n lines: \"x\" */", "\ufeff"])
_KEYS = st.sampled_from(["a", "'b c'", '"d\\u0065"', "$x", "_y1", "été"])
_SCALARS = st.sampled_from(["1", "-.5", "0xFF", "+Infinity", "null", "true", '"a \\" b"', "'it\\'s'", "'line\\\nnext'", "[1, 2,]", "{}"])


@st.composite
def objects(draw: st.DrawFn) -> str:
    """An object as a person may write it."""
    count = draw(st.integers(0, 4))
    text = draw(_BLANKS) + "{"
    for place in range(count):
        text += draw(_BLANKS) + draw(_KEYS) + draw(_BLANKS) + ":" + draw(_BLANKS) + draw(_SCALARS) + draw(_BLANKS)
        text += "," if place < count - 1 or draw(st.booleans()) else ""
    return text + draw(_BLANKS) + "}" + draw(_BLANKS)
