"""Ids of a reply to text, reasoning and calls: families, stop strings, broken calls, and any split of the ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from render_help import CHATML, make_tokenizer, own_text

from metaclaw_core.model import Reasoning, Text, ToolCall
from metaclaw_core.policy import families
from metaclaw_core.policy.families import Family, Schemas
from metaclaw_core.policy.parse import ReplyReader, held, new_call_id
from metaclaw_core.policy.tokens import Detokenizer, decode
from metaclaw_core.wire.answer import Call, Event, ReasoningDelta, TextDelta

pytestmark = pytest.mark.local

FAMILIES = {
    "kimi": families.KIMI,
    "deepseek": families.DEEPSEEK,
    "llama": families.LLAMA,
    "harmony": families.HARMONY,
    "hermes": families.HERMES,
}
SCHEMAS: Schemas = {
    "read": {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}},
    "now": {"type": "object", "properties": {}},
}
_TOKENIZERS: dict[str, Any] = {}


def tokenizer_for(family: Family) -> Any:
    """With the family's marks as special tokens; those of Hermes are not special."""
    if family.name not in _TOKENIZERS:
        marks = [mark for mark in (family.open, family.close, *family.marks, *family.ends) if mark]
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([] if family is families.HERMES else marks)]
        _TOKENIZERS[family.name] = make_tokenizer(CHATML, [own_text()], special=special, vocab_size=700)
    return _TOKENIZERS[family.name]


def reader(
    family: Family = families.HERMES,
    *,
    stops: Sequence[str] = (),
    schemas: Schemas | None = SCHEMAS,
    thinking: bool = False,
) -> ReplyReader:
    tokenizer = tokenizer_for(family)
    return ReplyReader(
        tokenizer,
        family,
        stop_ids=families.stops_of(family, tokenizer),
        stops=stops,
        schemas=schemas,
        thinking=thinking,
        call_id=lambda written: written.id or "id",
    )


def ids_of(text: str, family: Family = families.HERMES) -> list[int]:
    ids: list[int] = tokenizer_for(family)(text, add_special_tokens=False)["input_ids"]
    return ids


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring deltas of a kind as one."""
    out: list[Event] = []
    for event in events:
        if out and not isinstance(event, Call) and isinstance(before := out[-1], type(event)):
            out[-1] = type(event)(before.text + event.text)  # type: ignore[union-attr]
        else:
            out.append(event)
    return out


def read(text: str, family: Family = families.HERMES, **options: Any) -> tuple[list[Event], ReplyReader]:
    r = reader(family, **options)
    events = [event for id in ids_of(text, family) for event in r.feed([id])]
    return joined(events + r.finish()), r


T, R = TextDelta, ReasoningDelta
CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "a.txt"}}\n</tool_call>'
READ = Call("read", '{"path": "a.txt"}', "id")

# --- Hermes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("Hello, 你好 🙂.", [T("Hello, 你好 🙂.")]),
        ("", []),
        (" \n", [T(" \n")]),
        (CALL, [READ]),
        (f"Let me look.\n\n{CALL}", [T("Let me look."), READ]),
        (f"{CALL}\n{CALL}\n", [READ, READ]),
        (f"{CALL}\nand then\n", [READ, T("\nand then\n")]),
        ("<think>\nFirst.\n\nThen.\n</think>\n\nYes.", [R("First.\n\nThen."), T("Yes.")]),
        (f"<think>\nA file.\n</think>\n\n{CALL}", [R("A file."), READ]),
        ("<think>\n\n</think>\n\nYes.", [T("Yes.")]),
        ("<think>cut of", [R("cut of")]),
        ("a <think> in the middle </think>", [T("a <think> in the middle </think>")]),
        ("1 < 2, <tool>, <tool_call", [T("1 < 2, <tool>, <tool_call")]),
        ("<thi", [T("<thi")]),
        ("done  ", [T("done  ")]),
    ],
)
def test_a_reply_in_hermes_form(text: str, events: list[Event]):
    found, r = read(text)
    assert found == events
    assert not r.malformed
    assert r.kept == r.shown == len(ids_of(text))


def test_arguments_stay_as_the_model_wrote_them():
    raw = '{ "n": 1.50, "s": "\\u00fc", "big": 123456789012345678901234567890, "o": {"name": "x"} }'
    found, _ = read(f'<tool_call>{{"arguments": {raw}, "name": "read"}}</tool_call>')
    assert found == [Call("read", raw, "id")]


def test_arguments_may_hold_the_mark_that_ends_a_call():
    raw = '{"path": "about </tool_call> and <tool_call>"}'
    found, r = read(f'<tool_call>\n{{"name": "read", "arguments": {raw}}}\n</tool_call>')
    assert (found, r.malformed) == ([Call("read", raw, "id")], False)


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "read", "arguments": {"path": }}',
        '{"name": "read", "arguments": [1]}',
        '{"name": 7, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "read", "arguments": {"n": NaN}}',
        '{"name": "read", "arguments": {}} trailing',
        "[]",
        "",
        "read the file",
        "<function=read><parameter=path>\na</function>",
    ],
)
def test_a_malformed_call_is_text_to_the_letter(body: str):
    text = f"Look: \n<tool_call>\n{body}\n</tool_call>\nok"
    found, r = read(text)
    assert found == [T(text)]
    assert r.malformed


def test_what_follows_a_malformed_call_is_not_executed():
    text = f"<tool_call>\n{{broken\n</tool_call>\n{CALL}"
    found, r = read(text)
    assert (found, r.malformed) == ([T(text)], True)


def test_a_call_that_was_cut_off_is_text():
    text = CALL.removesuffix("</tool_call>")
    found, r = read(text)
    assert (found, r.malformed) == ([T(text)], True)


def test_a_call_of_an_undeclared_tool_is_given_to_the_client():
    found, r = read('<tool_call>{"name": "rm", "arguments": {}}</tool_call>')
    assert (found, r.malformed) == ([Call("rm", "{}", "id")], False)


def test_without_declared_tools_marks_are_text():
    found, r = read(f"Write {CALL}", schemas=None)
    assert (found, r.malformed) == ([T(f"Write {CALL}")], False)


def test_arguments_in_tags_get_the_types_of_the_schema():
    text = (
        "<tool_call>\n<function=read>\n<parameter=path>\n7\n</parameter>\n<parameter=lines>\n12\n</parameter>\n"
        "<parameter=deep>\n[1, 2]\n</parameter>\n<parameter=text>\na\n\nb\n</parameter>\n</function>\n</tool_call>"
    )
    assert read(text)[0] == [Call("read", '{"path": "7", "lines": 12, "deep": [1, 2], "text": "a\\n\\nb"}', "id")]


def test_a_call_in_glm_form():
    text = "<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>a b</arg_value>\n</tool_call><tool_call>now</tool_call>"
    assert read(text)[0] == [Call("read", '{"path": "a b"}', "id"), Call("now", "{}", "id")]


def test_where_the_prompt_opened_the_reasoning_a_reply_begins_inside_it():
    assert read("First.\n</think>\n\nYes.", thinking=True)[0] == [R("First."), T("Yes.")]


def test_the_message_has_reasoning_text_and_calls():
    _, r = read(f"<think>\nhm\n</think>\n\nLook.\n{CALL}")
    assert r.message.parts == (Reasoning("hm"), Text("Look."), ToolCall("read", '{"path": "a.txt"}', "id"))


# --- the other families ------------------------------------------------------------------------


def test_calls_in_kimi_form_have_ids_of_their_own():
    text = (
        "Look.<|tool_calls_section_begin|><|tool_call_begin|>functions.read:0<|tool_call_argument_begin|>"
        '{"path": "a"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
        "<|tool_calls_section_end|>"
    )
    found, r = read(text, families.KIMI)
    assert found == [T("Look."), Call("read", '{"path": "a"}', "functions.read:0"), Call("now", "{}", "functions.now:1")]
    broken, r = read(text.replace("{}", "{"), families.KIMI)
    assert (broken, r.malformed) == ([T(text.replace("{}", "{"))], True)


@pytest.mark.parametrize(
    "body",
    ['function<｜tool▁sep｜>read\n```json\n{"path": "a"}\n```', 'read<｜tool▁sep｜>{"path": "a"}'],
    ids=["V3", "V3.1"],
)
def test_calls_in_deepseek_form(body: str):
    each = f"<｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜>"
    text = f"<think>\nhm\n</think>\nLook.<｜tool▁calls▁begin｜>{each}\n{each}<｜tool▁calls▁end｜>"
    found, r = read(text, families.DEEPSEEK)
    assert found == [R("hm"), T("Look."), *[Call("read", '{"path": "a"}', "id")] * 2]
    assert not r.malformed


@pytest.mark.parametrize(
    ("text", "events", "malformed"),
    [
        ('{"name": "read", "parameters": {"path": "a"}}', [Call("read", '{"path": "a"}', "id")], False),
        ('<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', [Call("now", "{}", "id")] * 2, False),
        ('{"name": "Ann", "age": 7}', [T('{"name": "Ann", "age": 7}')], False),
        ("{a set}", [T("{a set}")], False),
        ("<|python_tag|>print(1)", [T("<|python_tag|>print(1)")], True),
        ("Here: {}", [T("Here: {}")], False),
    ],
)
def test_calls_in_llama_form(text: str, events: list[Event], malformed: bool):
    found, r = read(text, families.LLAMA)
    assert (found, r.malformed) == (events, malformed)


@pytest.mark.parametrize(
    ("text", "events", "malformed"),
    [
        ("<|channel|>final<|message|>Yes.<|return|>", [T("Yes.")], False),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
            [R("hm"), T("Yes.")],
            False,
        ),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.read "
            '<|constrain|>json<|message|>{"path": "a"}<|call|>',
            [R("hm"), Call("read", '{"path": "a"}', "id")],
            False,
        ),
        (' to=functions.now<|channel|>commentary json<|message|>{}<|call|>', [Call("now", "{}", "id")], False),
        (
            "<|channel|>commentary to=functions.now<|message|>{<|call|>",
            [T("<|channel|>commentary to=functions.now<|message|>{")],
            True,
        ),
        ("<|channel|>commentary<|message|>I will look.<|end|>", [T("I will look.")], False),
        ("just words, no header", [T("just words, no header")], False),
        ("<|channel|>anal", [], False),
    ],
)
def test_a_reply_in_harmony_form(text: str, events: list[Event], malformed: bool):
    found, r = read(text, families.HARMONY)
    assert (found, r.malformed) == (events, malformed)
    assert r.kept == len(ids_of(text, families.HARMONY))


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("<|start|><|channel|>final<|message|>", "harmony"),
        ("<|tool_calls_section_begin|>", "kimi"),
        ("<｜tool▁calls▁begin｜>", "deepseek"),
        ("<|start_header_id|>", "llama"),
        ("<|start_header_id|> <tool_call>", "hermes"),
        ("<|im_start|>", "hermes"),
    ],
)
def test_the_family_is_told_by_the_template(template: str, family: str):
    assert families.family_of(make_tokenizer(template)).name == family


def test_the_end_of_a_message_is_no_end_of_a_reply_in_harmony():
    tokenizer = tokenizer_for(families.HARMONY)
    names = {tokenizer.convert_ids_to_tokens(id) for id in families.stops_of(families.HARMONY, tokenizer)}
    assert names == {"<|return|>", "<|call|>", "<|im_end|>"}  # the last: the tokenizer's own


# --- where a reply ends ------------------------------------------------------------------------


def test_a_stop_id_ends_the_reply_and_is_kept():
    r = reader()
    events = r.feed([*ids_of("Yes."), *ids_of("<|im_end|>"), *ids_of("surplus")])
    assert (r.stopped, joined(events + r.finish())) == (True, [T("Yes.")])
    assert r.kept == r.shown == len(ids_of("Yes.")) + 1


def test_a_special_token_without_a_meaning_is_not_shown():
    assert read("a<|im_start|>b")[0] == [T("ab")]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_stop_string_is_found_across_segments(cut: int):
    ids = ids_of("One. STOPPED two.")
    r = reader(stops=("STOPPED",))
    events = r.feed(ids[:cut]) + r.feed(ids[cut:]) + r.finish()
    assert joined(events) == [T("One. ")]
    assert (r.stopped, r.stop_sequence) == (True, "STOPPED")


def test_ids_after_a_stop_string_are_surplus():
    ids = [*ids_of("One. "), *ids_of("END"), *ids_of(" two.")]
    r = reader(stops=("END",))
    r.feed(ids)
    r.finish()
    assert r.kept == len(ids_of("One. ")) + len(ids_of("END"))
    assert r.shown == len(ids_of("One. "))


def test_of_two_stop_strings_the_one_that_is_complete_first_ends_the_reply():
    found, r = read("xabcd", stops=("abcd", "bc"))
    assert (found, r.stop_sequence) == ([T("xa")], "bc")


def test_the_beginning_of_a_stop_string_at_the_end_is_text():
    found, r = read("One. STOPP", stops=("STOPPED",))
    assert (found, r.stop_sequence, r.kept) == ([T("One. STOPP")], None, len(ids_of("One. STOPP")))


def test_text_that_may_become_a_stop_string_is_held_back():
    r = reader(stops=("\n\n",))
    assert joined(r.feed(ids_of("One.\n"))) == [T("One.")]
    assert joined(r.feed(ids_of("Two."))) == [T("\nTwo.")]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_call_mark_across_segments_is_never_sent_as_text(cut: int):
    ids = [id for char in f"Look. {CALL}" for id in ids_of(char)]  # a model may spell the mark out
    r = reader()
    first = r.feed(ids[:cut])
    assert not any(isinstance(event, TextDelta) and "<" in event.text for event in first)
    assert joined(first + r.feed(ids[cut:]) + r.finish()) == [T("Look."), READ]


def test_a_character_in_several_tokens_is_given_when_it_is_complete():
    ids = ids_of("🙂")
    assert len(ids) == 4
    r = reader()
    assert r.feed(ids[:1]) == r.feed(ids[1:2]) == r.feed(ids[2:3]) == []
    assert r.feed(ids[3:]) == [T("🙂")]


def test_a_character_that_was_cut_off_is_a_replacement_character():
    r = reader()
    assert joined([*r.feed(ids_of("a🙂")[:-1]), *r.finish()]) == [T("a\ufffd")]


def test_held_is_the_longest_end_that_may_begin_a_mark():
    assert [held(text, ("<tool>", "ab")) for text in ("x", "x<", "x<to", "<tool>", "xa", "ab", "")] == [0, 1, 3, 0, 1, 0, 0]


def test_call_ids_look_like_those_of_the_dialects_provider():
    assert len(new_call_id("openai_chat")) == 29
    assert new_call_id("openai_responses").startswith("call_")
    assert new_call_id("anthropic").startswith("toolu_")
    assert new_call_id("anthropic") != new_call_id("anthropic")


def test_without_a_family_all_is_text():
    text = f"<think>\nhm\n</think>\n{CALL}\n"
    r = ReplyReader(tokenizer_for(families.HERMES), None, stop_ids=(2,), stops=("STOP",), call_id=lambda _: None)
    assert joined([*r.feed(ids_of(f"{text}STOP")), *r.finish()]) == [T(text)]


# --- any split ---------------------------------------------------------------------------------

# fmt: off
PIECES = st.sampled_from([
    CALL, "<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "\n\n", " ", "text", "STOP", "ST", "OP", "🙂", "é",
    '{"name": "now", "parameters": {}}', '{"name": "read"', "}", ";", "<|im_end|>", "<|python_tag|>", "<", "tool_call>",
    "<|channel|>", "final", "analysis", "commentary to=functions.now", "<|message|>", "<|end|>", "<|start|>assistant", "{}",
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.read:0", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>", "<|tool_calls_section_end|>", "\ufffd",
])
# fmt: on


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    text=st.lists(PIECES, max_size=12).map("".join),
    stops=st.sampled_from([(), ("STOP",), ("STOP", "\n\n", "tool")]),
    tools=st.booleans(),
    thinking=st.booleans(),
    data=st.data(),
)
def test_any_split_of_the_ids_gives_the_same_answer(
    family: str, text: str, stops: tuple[str, ...], tools: bool, thinking: bool, data: st.DataObject
):
    ids = ids_of(text, FAMILIES[family])
    if data.draw(st.booleans()):
        ids = data.draw(st.permutations(ids))  # bytes of characters apart, marks anywhere
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    answers = []
    for bounds in ([0, len(ids)], [0, *cuts, len(ids)], list(range(len(ids) + 1))):
        r = reader(FAMILIES[family], stops=stops, schemas=SCHEMAS if tools else None, thinking=thinking)
        events: list[Event] = []
        for start, end in pairwise(bounds):
            events += r.feed(ids[start:end])
        events += r.finish()
        answers.append((joined(events), r.kept, r.shown, r.stop_sequence, r.stopped, r.malformed))
    assert answers[0] == answers[1] == answers[2]


@given(ids=st.lists(st.integers(3, 690), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_pieces_of_text_join_to_what_the_tokenizer_makes_of_the_whole(ids: list[int], cuts: list[int]):
    tokenizer = tokenizer_for(families.HERMES)
    ids = [id for id in ids if id < len(tokenizer)]
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.feed(ids[a:b]) for a, b in pairwise(bounds)) + detokenizer.finish()
    assert text == decode(tokenizer, ids)


@given(text=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=60))
def test_plain_text_comes_out_as_it_went_in(text: str):
    ids = ids_of(text)
    said = "".join(event.text for event in read(text, schemas=None)[0] if isinstance(event, TextDelta))
    expected = decode(tokenizer_for(families.HERMES), ids)  # NFC is the tokenizer's doing
    assert said == expected
