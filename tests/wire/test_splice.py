"""The oracle parses whole bodies with the standard library; the code under test must agree without doing so."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metaclaw_core.errors import SpliceError
from metaclaw_core.wire import splice
from metaclaw_core.wire.base import Slot

SLOTS = {
    "openai_chat": splice.slot_openai_chat,
    "openai_responses": splice.slot_openai_responses,
    "anthropic": splice.slot_anthropic,
    "gemini": splice.slot_gemini,
    "ollama": splice.slot_ollama,
}
RAW_SEAL = re.compile(rb"\\n<!-- metaclaw:[0-9]+-[0-9]+-[0-9]+-[0-9]+:[0-9a-f]{16} -->")
SHARED = Path(os.getenv("METACLAW_SHARED") or Path(__file__).resolve().parents[2] / ".." / "shared")


def spliced(dialect: str, body: str | bytes, text: str = "T") -> str:
    """The body with `text` put in, without the seal."""
    raw = body.encode() if isinstance(body, str) else body
    out = splice.insert(raw, SLOTS[dialect](raw), text)
    bare, seals = RAW_SEAL.subn(b"", out)
    assert seals == 1
    return bare.decode("utf-8")


# --- the places, literally ----------------------------------------------------------------------

PLACES = [
    # chat completions: the last leading system or developer message
    ("openai_chat", '{"messages":[{"role":"system","content":"A"}]}', '{"messages":[{"role":"system","content":"A\\n\\nT"}]}'),
    ("openai_chat", '{"messages":[{"role":"system","content":""}]}', '{"messages":[{"role":"system","content":"T"}]}'),
    ("openai_chat", '{"messages":[{"content":"A","role":"developer"}]}', '{"messages":[{"content":"A\\n\\nT","role":"developer"}]}'),
    (
        "openai_chat",
        '{"messages":[{"role":"system","content":"A"},{"role":"developer","content":"B"},{"role":"user","content":"C"}]}',
        '{"messages":[{"role":"system","content":"A"},{"role":"developer","content":"B\\n\\nT"},{"role":"user","content":"C"}]}',
    ),
    (
        "openai_chat",
        '{"messages":[{"role":"user","content":"C"},{"role":"system","content":"A"}]}',
        '{"messages":[{"role":"system","content":"T"},{"role":"user","content":"C"},{"role":"system","content":"A"}]}',
    ),
    ("openai_chat", '{"messages":[{"role":"user","content":"C"}]}', '{"messages":[{"role":"system","content":"T"},{"role":"user","content":"C"}]}'),
    (
        "openai_chat",
        '{"messages":[{"role":"system","content":[{"type":"text","text":"A"}]}]}',
        '{"messages":[{"role":"system","content":[{"type":"text","text":"A"},{"type":"text","text":"T"}]}]}',
    ),
    ("openai_chat", '{"messages":[{"role":"system","content":[ ]}]}', '{"messages":[{"role":"system","content":[{"type":"text","text":"T"} ]}]}'),
    (
        "openai_chat",  # after the tools, and with the name as a property in them
        '{"tools":[{"properties":{"messages":{"type":"array"}}}],"messages":[{"role":"system","content":"A"}]}',
        '{"tools":[{"properties":{"messages":{"type":"array"}}}],"messages":[{"role":"system","content":"A\\n\\nT"}]}',
    ),
    (
        "openai_chat",  # content in the last message quotes a request
        '{"messages":[{"role":"system","content":"A\\\\"},{"role":"user","content":"{\\"messages\\":[{\\"role\\":\\"system\\"}]}"}]}',
        '{"messages":[{"role":"system","content":"A\\\\\\n\\nT"},{"role":"user","content":"{\\"messages\\":[{\\"role\\":\\"system\\"}]}"}]}',
    ),
    (
        "openai_chat",  # twice, where it doesn't matter
        '{"messages":[{"content":"C","content":"D","role":"user"}],"n":1,"n":1}',
        '{"messages":[{"role":"system","content":"T"},{"content":"C","content":"D","role":"user"}],"n":1,"n":1}',
    ),
    # Responses: instructions, else leading input, else a new key
    ("openai_responses", '{"input":"x","instructions":"A"}', '{"input":"x","instructions":"A\\n\\nT"}'),
    (
        "openai_responses",
        '{"instructions":"A","input":[{"role":"system","content":"B"}]}',
        '{"instructions":"A\\n\\nT","input":[{"role":"system","content":"B"}]}',
    ),
    ("openai_responses", '{"input":"x"}', '{"instructions":"T","input":"x"}'),
    ("openai_responses", ' { "input":[]}', ' {"instructions":"T", "input":[]}'),
    (
        "openai_responses",
        '{"input":[{"type":"message","role":"system","content":[{"type":"input_text","text":"A"}]},{"role":"user","content":"x"}]}',
        '{"input":[{"type":"message","role":"system","content":[{"type":"input_text","text":"A"},{"type":"input_text","text":"T"}]},{"role":"user","content":"x"}]}',
    ),
    (
        "openai_responses",
        '{"instructions":null,"input":[{"role":"developer","content":"A"}]}',
        '{"instructions":null,"input":[{"role":"developer","content":"A\\n\\nT"}]}',
    ),
    (
        "openai_responses",
        '{"previous_response_id":"r","input":[{"type":"function_call_output","output":"\\"input\\":1"}]}',
        '{"instructions":"T","previous_response_id":"r","input":[{"type":"function_call_output","output":"\\"input\\":1"}]}',
    ),
    (
        "openai_responses",
        '{"input":[{"role":"user","content":"x"}],"tools":[{"parameters":{"properties":{"instructions":{"type":"string"},"input":{}}}}]}',
        '{"instructions":"T","input":[{"role":"user","content":"x"}],"tools":[{"parameters":{"properties":{"instructions":{"type":"string"},"input":{}}}}]}',
    ),
    # Anthropic: system before or behind the history
    ("anthropic", '{"system":"A","messages":[]}', '{"system":"A\\n\\nT","messages":[]}'),
    ("anthropic", '{"messages":[],"system":""}', '{"messages":[],"system":"T"}'),
    ("anthropic", '{"messages":[]}', '{"system":"T","messages":[]}'),
    ("anthropic", '{"system":[],"messages":[]}', '{"system":[{"type":"text","text":"T"}],"messages":[]}'),
    (
        "anthropic",
        '{"messages":[],"system":[{"type":"text","text":"A","cache_control":{"type":"ephemeral"}}]}',
        '{"messages":[],"system":[{"type":"text","text":"A","cache_control":{"type":"ephemeral"}},{"type":"text","text":"T"}]}',
    ),
    (
        "anthropic",  # decoys on both sides: a tool's input and a tool's schema
        '{"messages":[{"role":"assistant","content":[{"type":"tool_use","input":{"system":"x","k":1}}]}],"system":"A","tools":[{"input_schema":{"properties":{"system":{"type":"string"}}}}]}',
        '{"messages":[{"role":"assistant","content":[{"type":"tool_use","input":{"system":"x","k":1}}]}],"system":"A\\n\\nT","tools":[{"input_schema":{"properties":{"system":{"type":"string"}}}}]}',
    ),
    (
        "anthropic",  # only a decoy, at the very end
        '{"messages":[{"role":"assistant","content":[{"type":"tool_use","input":{"system":"x"}}]}]}',
        '{"system":"T","messages":[{"role":"assistant","content":[{"type":"tool_use","input":{"system":"x"}}]}]}',
    ),
    ("anthropic", '{"messages":[],"\\u0073ystem":"A"}', '{"messages":[],"\\u0073ystem":"A\\n\\nT"}'),
    ("anthropic", '{"messages":[],"a\\"system":"A"}', '{"system":"T","messages":[],"a\\"system":"A"}'),
    (
        "anthropic",  # pretty-printed
        '{\n  "messages": [],\n  "system" : [\n    {"type": "text", "text": "A"}\n  ]\n}\n',
        '{\n  "messages": [],\n  "system" : [\n    {"type": "text", "text": "A"},{"type":"text","text":"T"}\n  ]\n}\n',
    ),
    # Gemini: both spellings, parts as a list or as one object
    ("gemini", '{"contents":[],"systemInstruction":{"parts":[{"text":"A"}]}}', '{"contents":[],"systemInstruction":{"parts":[{"text":"A"},{"text":"T"}]}}'),
    (
        "gemini",
        '{"system_instruction":{"role":"system","parts":[{"text":"A"}]},"contents":[]}',
        '{"system_instruction":{"role":"system","parts":[{"text":"A"},{"text":"T"}]},"contents":[]}',
    ),
    ("gemini", '{"systemInstruction":{"parts":{"text":"A"}},"contents":[]}', '{"systemInstruction":{"parts":{"text":"A\\n\\nT"}},"contents":[]}'),
    ("gemini", '{"systemInstruction":{"parts":[]},"contents":[]}', '{"systemInstruction":{"parts":[{"text":"T"}]},"contents":[]}'),
    ("gemini", '{"systemInstruction":"A","contents":[]}', '{"systemInstruction":"A\\n\\nT","contents":[]}'),
    ("gemini", '{"contents":[]}', '{"systemInstruction":{"parts":[{"text":"T"}]},"contents":[]}'),
    # Ollama
    ("ollama", '{"messages":[{"role":"system","content":"A"}]}', '{"messages":[{"role":"system","content":"A\\n\\nT"}]}'),
    ("ollama", '{"messages":[{"role":"user","content":"C"}]}', '{"messages":[{"role":"system","content":"T"},{"role":"user","content":"C"}]}'),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "body", "expected"), PLACES)
def test_the_text_stands_at_the_end_of_the_system_prompt_and_can_be_taken_out(dialect: str, body: str, expected: str):
    assert spliced(dialect, body) == expected
    sent = splice.insert(body.encode(), SLOTS[dialect](body.encode()), "T")
    assert splice.remove(sent, SLOTS[dialect](sent)) == (body.encode(), "T")


REFUSED = [
    ("openai_chat", '{"messages":[{"role":"system","content":null}]}', "no content"),
    ("openai_chat", '{"messages":[{"role":"system"}]}', "no content"),
    ("openai_chat", '{"messages":[{"role":"system","content":["A"]}]}', "not an object"),
    ("openai_chat", '{"messages":[]}', "empty"),
    ("openai_chat", '{"messages":["A"]}', "not an object"),
    ("openai_chat", '{"messages":[{"content":"A"}]}', "no role"),
    ("openai_chat", '{"messages":{}}', "no list of messages"),
    ("openai_chat", '{"model":"m"}', "no list of messages"),
    ("openai_chat", '{"messages":[{"role":"system","content":"A","content":"B"}]}', "twice"),
    ("openai_chat", '{"messages":[{"role":"system","content":"A"}],"messages":[]}', "twice"),
    ("openai_chat", '{"messages":[{"role":"system","content":"A"}],"m\\u0065ssages":[]}', "twice"),
    ("openai_chat", '{"messages":[{"role":"system","content":"A","role":"user"}]}', "twice"),
    ("openai_responses", '{"instructions":null,"input":"x"}', "instructions is null"),
    ("openai_responses", '{"instructions":["A"],"input":"x"}', "neither a string nor null"),
    ("openai_responses", '{"instructions":"A","input":"x","instructions":"B"}', "twice"),
    ("openai_responses", '{"input":{}}', "neither a string nor a list"),
    ("openai_responses", '{"model":"m"}', "no input"),
    ("openai_responses", '{"input":[{"role":"system","content":null}]}', "no content"),
    ("anthropic", '{"messages":[],"system":null}', "neither"),
    ("anthropic", '{"messages":[],"system":{"text":"A"}}', "neither"),
    ("anthropic", '{"messages":[],"system":["A"]}', "not an object"),
    ("anthropic", '{"system":"A","messages":[],"system":"B"}', "twice"),
    ("anthropic", '{"s\\u0079stem":"A","messages":[],"system":"B"}', "twice"),
    ("anthropic", '{"prompt":"A"}', "no list of messages"),
    ("gemini", '{"contents":[],"systemInstruction":{"parts":[]},"system_instruction":{"parts":[]}}', "both"),
    ("gemini", '{"contents":[],"systemInstruction":{"parts":[],"parts":[]}}', "twice"),
    ("gemini", '{"contents":[],"systemInstruction":{}}', "no key"),
    ("gemini", '{"contents":[],"systemInstruction":null}', "no parts"),
    ("gemini", '{"contents":[],"systemInstruction":{"parts":{"inlineData":{}}}}', "no text"),
    ("gemini", '{"contents":[],"systemInstruction":{"parts":{"text":"A","text":"B"}}}', "twice"),
    ("gemini", '{"model":"m"}', "no contents"),
    ("ollama", '{"messages":[{"role":"system","content":[{"type":"text","text":"A"}]}]}', "no content"),
    ("ollama", '{"prompt":"A","system":"B"}', "no list of messages"),
]


@pytest.mark.parametrize(("dialect", "body", "reason"), REFUSED)
def test_an_unknown_shape_or_a_key_that_comes_twice_is_refused(dialect: str, body: str, reason: str):
    with pytest.raises(SpliceError, match=reason):
        SLOTS[dialect](body.encode())


@pytest.mark.parametrize("dialect", SLOTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{}",
        b"[]",
        b'"system"',
        b"null",
        b'\xef\xbb\xbf{"messages":[],"contents":[],"input":""}',
        '{"messages":[],"contents":[],"input":""}'.encode("utf-16"),
        '{"messages":[],"contents":[],"input":""}'.encode("utf-16-le"),
        b'{"messages":[{"role":"system","content":"A"}],"system":"A","instructions":"A","systemInstruction":"A"',
        b'{"system":' + b'{"system":' * 50_000 + b"}" * 50_001,
    ],
    ids=["nothing", "space", "empty", "list", "string", "null", "bom", "utf-16", "utf-16-le", "cut", "deep-decoys"],
)
def test_what_is_no_json_object_in_utf8_is_refused(dialect: str, body: bytes):
    with pytest.raises(SpliceError):
        SLOTS[dialect](body)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1" * 5000, "01", "'x'", '"\t"', "[" * 100_000])
def test_what_stands_before_a_key_in_front_is_parsed(value: str):
    body = f'{{"a":{value},"system":"A","messages":[{{"role":"user","content":"{"x" * 4 * len(value)}"}}]}}'
    with pytest.raises(SpliceError):
        splice.slot_anthropic(body.encode())


def test_what_is_broken_on_the_side_that_is_not_parsed_stays_broken():
    assert spliced("anthropic", '{"messages":[},"x":NaN,"system":"A"}') == '{"messages":[},"x":NaN,"system":"A\\n\\nT"}'
    assert (
        spliced("openai_chat", '{"messages":[{"role":"system","content":"A"},{"role":"user",xxxxxxxxxxxxxxxxxxxxxxx}')
        == '{"messages":[{"role":"system","content":"A\\n\\nT"},{"role":"user",xxxxxxxxxxxxxxxxxxxxxxx}'
    )


def test_big_integers_lone_surrogates_and_raw_utf8_stay_as_they_were():
    body = '{"seed":12345678901234567890123,"messages":[{"role":"system","content":"\\ud800 é 中"}]}'
    assert (
        spliced("openai_chat", body, "ü \ud83d")
        == '{"seed":12345678901234567890123,"messages":[{"role":"system","content":"\\ud800 é 中\\n\\n\\u00fc \\ud83d"}]}'
    )


def test_many_decoys_are_counted_by_one_walk_over_the_body():
    decoys = '{"system":1},' * 50 + "0"
    assert spliced("anthropic", f'{{"messages":[{decoys}],"system":"A"}}').endswith('"system":"A\\n\\nT"}')
    with pytest.raises(SpliceError, match="twice"):
        SLOTS["anthropic"](f'{{"system":"","messages":[{decoys}],"system":"A"}}'.encode())


# --- the block ----------------------------------------------------------------------------------


def test_the_sealed_block_is_these_bytes():
    body = b'{"messages":[],"system":"A"}'
    sent = splice.insert(body, splice.slot_anthropic(body), splice.render_block("## Be brief"))
    assert sent == (
        b'{"messages":[],"system":"A\\n\\n<metaclaw-skills>\\n## Be brief\\n</metaclaw-skills>\\n'
        b'<!-- metaclaw:50-4-0-0:abd984befdaf8576 -->"}'
    )


def test_a_block_that_grows_keeps_its_beginning():
    body = b'{"messages":[],"system":"A"}'
    slot = splice.slot_anthropic(body)
    first = splice.insert(body, slot, splice.render_block("one"))
    second = splice.insert(body, slot, splice.render_block("one\n\ntwo"))
    kept = first.index(b"\\n</metaclaw-skills>")
    assert second[:kept] == first[:kept]
    assert splice.remove(second, splice.slot_anthropic(second)) == (body, "<metaclaw-skills>\none\n\ntwo\n</metaclaw-skills>")


def test_a_block_is_seen_only_at_the_place():
    body = b'{"messages":[{"role":"user","content":"x"}],"system":"A"}'
    sent = splice.insert(body, splice.slot_anthropic(body), "T")
    moved = json.dumps({"messages": [{"role": "user", "content": json.loads(sent)["system"]}], "system": "A"}).encode()
    assert splice.has_block(sent, splice.slot_anthropic(sent))
    assert not splice.has_block(body, splice.slot_anthropic(body))
    assert not splice.has_block(moved, splice.slot_anthropic(moved))
    assert splice.remove(moved, splice.slot_anthropic(moved)) is None
    assert splice.remove(body, splice.slot_anthropic(body)) is None


def test_text_that_somebody_put_behind_the_block_hides_it():
    body = b'{"messages":[],"system":"A"}'
    sent = splice.insert(body, splice.slot_anthropic(body), "T").replace(b' -->"', b' --> more"')
    assert splice.remove(sent, splice.slot_anthropic(sent)) is None


def test_an_edited_block_is_seen_but_not_removed():
    body = b'{"messages":[],"system":"A"}'
    sent = splice.insert(body, splice.slot_anthropic(body), "Text").replace(b"Text", b"Tent")
    slot = splice.slot_anthropic(sent)
    assert splice.has_block(sent, slot)
    assert splice.remove(sent, slot) is None


def test_a_text_that_quotes_a_block_comes_back_whole():
    body = b'{"messages":[],"system":[]}'
    quoted = json.loads(splice.insert(body, splice.slot_anthropic(body), splice.render_block("in")))["system"][0]["text"]
    sent = splice.insert(body, splice.slot_anthropic(body), quoted)
    assert splice.remove(sent, splice.slot_anthropic(sent)) == (body, quoted)


@pytest.mark.parametrize(("dialect", "body", "_"), PLACES)
def test_a_block_on_a_block_leaves_the_first(dialect: str, body: str, _: str):
    once = splice.insert(body.encode(), SLOTS[dialect](body.encode()), "one")
    twice = splice.insert(once, SLOTS[dialect](once), "two")
    assert splice.remove(twice, SLOTS[dialect](twice)) == (once, "two")


def test_a_seal_behind_an_odd_backslash_is_not_cut_out():
    # the client's own string: a backslash, an "n" and the rest of what a block would be
    body = b'{"messages":[],"system":"A"}'
    forged = splice.insert(body, splice.slot_anthropic(body), "T").replace(b'"A', b'"A\\')
    assert json.loads(forged)["system"].startswith("A\\n\nT")
    assert splice.remove(forged, splice.slot_anthropic(forged)) is None


def test_a_block_made_for_an_empty_string_is_not_cut_out_behind_words():
    body = b'{"messages":[],"system":""}'
    forged = splice.insert(body, splice.slot_anthropic(body), "T").replace(b'"system":"', b'"system":"A')
    assert splice.remove(forged, splice.slot_anthropic(forged)) is None


def test_a_block_with_escapes_that_insert_does_not_write_is_not_ours():
    for inner, ours in ((b"a/b", True), (b"a\\/b", False)):
        digest = hashlib.sha256(b"\\n\\n" + inner).hexdigest()[:16].encode()
        body = b'{"messages":[],"system":"A\\n\\n%s\\n<!-- metaclaw:%d-4-0-0:%s -->"}' % (inner, len(inner), digest)
        assert (splice.remove(body, splice.slot_anthropic(body)) is not None) is ours


def test_a_seal_that_claims_more_than_there_is_is_not_ours():
    body = b'{"messages":[],"system":"A\\n<!-- metaclaw:99-4-0-0:0123456789abcdef -->"}'
    assert splice.remove(body, splice.slot_anthropic(body)) is None


# --- properties ---------------------------------------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """An object as its members in order, so that a key can come twice."""


NAMES = ["system", "messages", "instructions", "input", "systemInstruction", "system_instruction", "contents"]
NAMES += ["role", "content", "parts", "text", "type", "a", 'x"system', "système"]
STRINGS = ["", "A", 'say "system": "x",', '\\"messages\\":[', "\\", "é中😀", "\ud800", "\n\t\x00", "}]}", '{"system":"x"}', "/"]
names = st.sampled_from(NAMES)
strings = st.sampled_from(STRINGS)
leaves = st.one_of(strings, st.sampled_from([None, True, 0, -1.5, 10**25]))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(st.tuples(names, inner), max_size=3, unique_by=lambda pair: pair[0]).map(Pairs),
    ),
    max_leaves=6,
)
objects = st.lists(st.tuples(names, values), max_size=2, unique_by=lambda pair: pair[0]).map(Pairs)
texts = st.one_of(st.text(max_size=20), strings, st.just(splice.render_block("inner")))


@st.composite
def members_of(draw: st.DrawFn, *fixed: tuple[str, Any]) -> Pairs:
    """`fixed` and a few more members, in any order; now and then one of them twice."""
    extra = [pair for pair in draw(objects) if pair[0] not in dict(fixed) and pair[0] not in ("role", "type", "content")]
    members = [*fixed, *extra]
    if members and draw(st.integers(0, 11)) == 0:
        members.append((draw(st.sampled_from(members))[0], draw(values)))
    return Pairs(draw(st.permutations(members)))


def blocks(kind: str) -> st.SearchStrategy[Any]:
    block = st.builds(lambda text: Pairs([("type", kind), ("text", text)]), strings)
    return st.one_of(strings, strings, st.lists(block, max_size=2), leaves)


@st.composite
def messages(draw: st.DrawFn, kind: str) -> list[Any]:
    roles = draw(st.lists(st.sampled_from(["system", "developer"]), max_size=2)) + draw(
        st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=2)
    )
    return [draw(members_of(("role", role), ("content", draw(blocks(kind))))) for role in roles]


@st.composite
def documents(draw: st.DrawFn, dialect: str) -> Pairs:
    fixed: list[tuple[str, Any]] = [("model", "m")]
    if dialect in ("openai_chat", "ollama"):
        fixed.append(("messages", draw(messages("text"))))
    elif dialect == "openai_responses":
        fixed.append(("input", draw(st.one_of(strings, messages("input_text")))))
        if draw(st.booleans()):
            fixed.append(("instructions", draw(st.one_of(strings, strings, leaves))))
    elif dialect == "anthropic":
        fixed.append(("messages", draw(st.lists(values, max_size=3))))
        if draw(st.booleans()):
            fixed.append(("system", draw(blocks("text"))))
    else:
        fixed.append(("contents", draw(st.lists(values, max_size=3))))
        part = members_of(("text", draw(strings)))
        parts = draw(st.one_of(st.lists(part, max_size=2), part, leaves))
        if draw(st.booleans()):
            name = draw(st.sampled_from(["systemInstruction", "system_instruction"]))
            fixed.append((name, draw(st.one_of(members_of(("parts", parts)), members_of(("parts", parts)), leaves))))
    return draw(members_of(*fixed))


def render(value: Any, rng: random.Random, style: str) -> str:
    """JSON text of a value with white space and escapes as some client might choose them."""

    def space() -> str:
        return "".join(rng.choices(" \t\n\r", k=rng.randint(0, 2))) if style != "compact" else ""

    def string(text: str) -> str:
        if style == "compact":
            return json.dumps(text, ensure_ascii=any("\ud800" <= c <= "\udfff" for c in text))
        out = json.dumps(text)
        if style == "escapes" and rng.random() < 0.2:
            return '"' + "".join(f"\\u{ord(c):04x}" if "a" <= c <= "z" else json.dumps(c)[1:-1] for c in text) + '"'
        return out

    def go(value: Any) -> str:
        if isinstance(value, Pairs):
            inner = ",".join(space() + string(k) + space() + ":" + space() + go(v) + space() for k, v in value)
            return "{" + (inner or space()) + "}"
        if isinstance(value, list):
            return "[" + (",".join(space() + go(v) + space() for v in value) or space()) + "]"
        return string(value) if isinstance(value, str) else json.dumps(value)

    return space() + go(value) + space()


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    dialect = draw(st.sampled_from(sorted(SLOTS)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    text = render(draw(documents(dialect)), rng, draw(st.sampled_from(["compact", "spaces", "escapes"])))
    return dialect, text.encode()


class Refused(Exception):
    """The oracle knows no place."""


def one(pairs: Any, name: str) -> Any:
    """The value of a key that may be absent (Ellipsis) but not doubled."""
    if not isinstance(pairs, Pairs):
        raise Refused("not an object")
    found = [value for key, value in pairs if key == name]
    if len(found) > 1:
        raise Refused("doubled")
    return found[0] if found else ...


def oracle(dialect: str, doc: Any, text: str) -> Any:
    """The document with the text added, from a full parse; Refused where there is no place for it."""

    def put(pairs: Pairs, name: str, value: Any) -> Pairs:
        return Pairs((key, value if key == name else old) for key, old in pairs)

    def grown(value: Any, block: list[tuple[str, str]] | None) -> Any:
        if isinstance(value, str):
            return f"{value}\n\n{text}" if value else text
        if isinstance(value, list) and not isinstance(value, Pairs) and block is not None and all(isinstance(v, Pairs) for v in value):
            return [*value, Pairs([*block, ("text", text)])]
        raise Refused("no text here")

    def leading(items: list[Any], kind: str | None) -> list[Any] | None:
        last = -1
        for item in items:
            if not isinstance(item, Pairs) or [value for key, value in item if key == "role"][:1] not in (["system"], ["developer"]):
                break
            if len({key for key, _ in item}) < len(item):
                raise Refused("doubled")
            last += 1
        if last < 0:
            return None
        content = grown(one(items[last], "content"), [("type", kind)] if kind else None)
        return [*items[:last], put(items[last], "content", content), *items[last + 1 :]]

    if dialect in ("openai_chat", "ollama"):
        items = one(doc, "messages")
        if not isinstance(items, list) or isinstance(items, Pairs) or not items:
            raise Refused("no messages")
        changed = leading(items, "text" if dialect == "openai_chat" else None)
        return put(doc, "messages", changed or [Pairs([("role", "system"), ("content", text)]), *items])
    if dialect == "openai_responses":
        instructions, items = one(doc, "instructions"), ...
        if isinstance(instructions, str):
            return put(doc, "instructions", grown(instructions, None))
        items = one(doc, "input")
        changed = leading(items, "input_text") if isinstance(items, list) and not isinstance(items, Pairs) else None
        if instructions not in (..., None) or (changed is None and (instructions is None or items is ...)):
            raise Refused("no place")
        return put(doc, "input", changed) if changed is not None else Pairs([("instructions", text), *doc])
    if dialect == "anthropic":
        system = one(doc, "system")
        return Pairs([("system", text), *doc]) if system is ... else put(doc, "system", grown(system, [("type", "text")]))
    found = {name: one(doc, name) for name in ("systemInstruction", "system_instruction")}
    there = [name for name, value in found.items() if value is not ...]
    if len(there) == 2:
        raise Refused("both")
    if not there:
        return Pairs([("systemInstruction", Pairs([("parts", [Pairs([("text", text)])])])), *doc])
    instruction = found[there[0]]
    if isinstance(instruction, str):
        return put(doc, there[0], grown(instruction, None))
    parts = one(instruction, "parts")
    if len({key for key, _ in instruction}) < len(instruction):
        raise Refused("doubled")
    if isinstance(parts, Pairs):
        if len({key for key, _ in parts}) < len(parts):
            raise Refused("doubled")
        new: Any = put(parts, "text", grown(one(parts, "text"), None))
    elif isinstance(parts, list):
        new = grown(parts, [])
    else:
        raise Refused("no parts")
    return put(doc, there[0], put(instruction, "parts", new))


def parse(body: bytes) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(word)

    return json.loads(body.decode("utf-8"), object_pairs_hook=Pairs, parse_constant=refuse)


def unsealed(value: Any) -> Any:
    """The parsed result without the seal, which is in one string."""
    return json.loads(RAW_SEAL.sub(b"", json.dumps(encode(value)).encode()))


def encode(value: Any) -> Any:
    """Objects as lists marked with their kind, so that doubled keys and the order of keys count."""
    if isinstance(value, Pairs):
        return ["object", *([key, encode(item)] for key, item in value)]
    return ["list", *map(encode, value)] if isinstance(value, list) else value


def doubled(doc: Any) -> bool:
    return isinstance(doc, Pairs) and len({key for key, _ in doc}) < len(doc)


def check(dialect: str, body: bytes, slot: Slot, text: str) -> bytes:
    """Everything that must hold where a slot was given for a body that parses."""
    sent = splice.insert(body, slot, text)
    assert unsealed(parse(sent)) == encode(oracle(dialect, parse(body), text))
    assert splice.remove(sent, SLOTS[dialect](sent)) == (body, text)
    assert splice.has_block(sent, SLOTS[dialect](sent))
    added = len(sent) - len(body)
    assert sent[: slot.at] + sent[slot.at + added :] == body
    return sent


@settings(max_examples=600, deadline=None)
@given(bodies(), texts)
def test_the_parsed_body_changes_by_the_text_alone_and_the_bytes_come_back(drawn: tuple[str, bytes], text: str):
    dialect, body = drawn
    try:
        slot = SLOTS[dialect](body)
    except SpliceError:
        if not doubled(parse(body)):  # any doubled key may be refused, also one that doesn't matter
            with pytest.raises(Refused):
                oracle(dialect, parse(body), text)
        return
    check(dialect, body, slot, text)


JUNK = [b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b" ", b"\x00", b"\xff", b"n", b"0", b'"system":', b'"messages":[', b"\\u0073"]


@settings(max_examples=600, deadline=None)
@given(bodies(), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(JUNK)), min_size=1, max_size=3), texts)
@example(("anthropic", b'{"messages":[],"system":"A"}'), [(0.6, 0, b"\\")], "T")
def test_broken_bodies_are_refused_or_stay_as_broken_as_they_were(
    drawn: tuple[str, bytes], edits: list[tuple[float, int, bytes]], text: str
):
    dialect, body = drawn
    for where, cut, junk in edits:
        at = int(where * len(body))
        body = body[:at] + junk + body[at + cut :]
    try:
        slot = SLOTS[dialect](body)
    except SpliceError:
        return
    try:
        parse(body)
    except (ValueError, RecursionError):
        with pytest.raises((ValueError, RecursionError)):
            parse(splice.insert(body, slot, text))
    else:
        check(dialect, body, slot, text)


@settings(max_examples=150, deadline=None)
@given(bodies(), st.integers(0, 200))
def test_a_body_that_is_cut_off_is_refused_or_stays_invalid(drawn: tuple[str, bytes], kept: int):
    dialect, body = drawn[0], drawn[1].rstrip()[: min(kept, len(drawn[1].rstrip()) - 1)]
    try:
        slot = SLOTS[dialect](body)
    except SpliceError:
        return
    with pytest.raises(ValueError, match=r".*"):
        parse(splice.insert(body, slot, "T"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60), st.sampled_from(["string", "item", "new"]))
def test_remove_answers_none_for_any_bytes(body: bytes, at: int, form: str):
    slot = Slot(min(at, len(body)), b"", b'"}' if form == "item" else b"", "", form)
    assert splice.remove(body, slot) is None
    assert not splice.has_block(body, slot)


# --- recordings ---------------------------------------------------------------------------------

BY_PATH = {"/chat/completions": "openai_chat", "/responses": "openai_responses", "/messages": "anthropic"}
BY_PATH |= {"GenerateContent": "gemini", "/api/chat": "ollama"}


def recordings() -> list[Path]:
    return sorted((SHARED / "captures").glob("*.mitm"))


@pytest.mark.shared
@pytest.mark.skipif(not recordings(), reason="needs the recordings in ../shared/captures")
@pytest.mark.parametrize("path", recordings(), ids=lambda path: path.stem)
def test_every_recorded_request_takes_a_block_and_gives_it_back(path: Path):
    from mitmproxy.io import FlowReader

    block = splice.render_block("## Be brief\n\nSay what you did.")
    with path.open("rb") as file:
        for flow in FlowReader(file).stream():
            dialect = next(name for part, name in BY_PATH.items() if part in flow.request.path)
            body = flow.request.content
            slot = SLOTS[dialect](body)
            sent = check(dialect, body, slot, block)
            assert slot.form == ("item" if dialect in ("anthropic", "gemini") else "string")
            assert sent.count(b'"cache_control"') == body.count(b'"cache_control"')
