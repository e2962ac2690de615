"""Wrappers come off, a human's own words stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.agents.envelope import CARRIER, CONTINUE, MARK, QUEUED, split_runtime, unwrap

STAMP = "[Wed 2026-11-25 07:24 UTC] "
SENDER = f'Conversation info: {MARK}\n```json\n{{"sender":{{"id":"4242","name":"Ada","username":"ada_l"}}}}\n```\n\n'
RUNTIME = "\n\nRuntime: agent=main | session=agent:main:main | sessionId=37341618-52f5-45d7-8234-91ebfdc784f7 | shell=bash"

# --- seen on the wire (webchat, HTTP endpoint, Telegram) ------------------------------------------

WIRE = {
    "webchat": (STAMP + "hello from webchat", "hello from webchat"),
    "another time zone": ("[Tue 2026-12-01 23:05 GMT+5:30] hi", "hi"),
    "telegram": (STAMP + SENDER + "what did I mean by that?", "what did I mean by that?"),
    "a list behind the sender": (STAMP + SENDER + "[ ] buy milk\n[WIP] fix this", "[ ] buy milk\n[WIP] fix this"),
    "a photo with a caption": (
        STAMP + SENDER + "[media attached: /w/media/inbound/a.png (image/png)]\n[Image]\nUser text:\nWhat is this?\n"
        "Description:\nA cat.",
        "What is this?",
    ),
    "a photo without words": (
        STAMP + SENDER + "[media attached: /w/media/inbound/a.png (image/png)]\n[Image]\nDescription:\nA cat.",
        "",
    ),
    "earlier messages given to the HTTP endpoint": (
        STAMP + "[Chat messages since your last reply - for context]\nUser: first q\nAssistant: first a\n\n"
        "[Current message - respond to this]\nUser: second q",
        "second q",
    ),
}

# --- read in the client's code --------------------------------------------------------------------

CODE = {
    "a reply in front of the words": (
        STAMP + SENDER + 'Current message:\n[Replying to: "say \\"hi\\""]\n#13: and this?',
        "and this?",
    ),
    "lines of earlier chat": (
        STAMP + SENDER + f"Chat history since last reply: {MARK}\n#20 Bob: morning\n#21 Ada: red\n\nsummarise",
        "summarise",
    ),
    "two blocks and context at the end": (
        STAMP + SENDER + f'Location: {MARK}\n```json\n{{"latitude":1}}\n```\n\nwhere am I\n\nContext: {MARK}\nnotes of the channel',
        "where am I",
    ),
    "labels of older releases": (
        'Sender (untrusted metadata):\n```json\n{"label":"Ada"}\n```\n\nhello',
        "hello",
    ),
    "a delivery hint": (
        STAMP + "Delivery: to send a message, use the `message` tool.\n\nhello",
        "hello",
    ),
    "a goal": (STAMP + "Active goal: ship it — advance; keep active until fully achieved; block only …\n\nhello", "hello"),
    "a plug-in's memory": (
        STAMP + "Context:\n<active_memory_plugin>\nlikes tea\n</active_memory_plugin>\n\nhello",
        "hello",
    ),
    "messages that waited": (
        STAMP + "[Queued messages while agent was busy]\n\n---\nQueued #1 (from Ada)\nalso do A\n\n---\nQueued #2\nand B",
        "also do A\n\nand B",
    ),
    "a voice message": (STAMP + "[Audio]\nTranscript:\ncall me back", "call me back"),
    "a voice message with a caption": (STAMP + "[Audio]\nUser text:\nlisten\nTranscript:\ncall me back", "listen\ncall me back"),
    "two pictures": (
        STAMP + "[media attached: 2 files]\n[media attached 1/2: a (image/png)]\n[media attached 2/2: b (image/png)]\n"
        "User text:\ncompare\n\n[Image 1/2]\nDescription:\nA.\n\n[Image 2/2]\nDescription:\nB.",
        "compare",
    ),
    "media and not a word": (STAMP + "[User sent media without caption]", ""),
    "a direct message's header": ("[Telegram Ada id:42 +2m Wed 2026-11-25 07:24 UTC] Ada: hello", "hello"),
    "a group's header": ("[WhatsApp Ops id:123@g.us 2026-11-25 07:24 EST] Bob (+1555): hello", "hello"),
    "a header without a speaker": ("[Signal Ada 2026-11-25 07:24:10 UTC] note: buy milk", "note: buy milk"),
}


@pytest.mark.parametrize("case", WIRE)
def test_what_was_seen_on_the_wire_comes_off(case: str) -> None:
    text, words = WIRE[case]
    assert (unwrap(text).text, unwrap(text).unknown) == (words, 0)


@pytest.mark.parametrize("case", CODE)
def test_what_the_client_can_write_comes_off(case: str) -> None:
    text, words = CODE[case]
    assert (unwrap(text).text, unwrap(text).unknown) == (words, 0)


@pytest.mark.parametrize(
    "words",
    [
        "[ ] buy milk",
        "[x] done",
        "[link](https://example.org) is broken",
        "[WIP] fix this",
        "[URGENT] deploy by 2026-11-25 07:24 UTC",
        "[2026-11-25 07:24:10] ERROR disk full",
        "[ERROR 2026-11-25 07:24:10 UTC] disk full",
        "[1, 2, 3] is my list",
        "[Image] of what?",
        "Sender: me\n```json\n{}\n```",
        "my config (untrusted, I think):\nport = 1",
        "Context: the deploy is red",
        "Conversation info:\n```json\n{}\n```\nwhat is this block?",
        "Continue the current task, please",
        "Current message:\nhello",
        "Runtime: agent=main is what the log says",
        "System: I am the user",
    ],
)
def test_a_humans_own_brackets_and_colons_stay(words: str) -> None:
    assert unwrap(STAMP + words).text == words
    assert unwrap(words).text == words
    assert unwrap(words).unknown == 0


def test_a_header_after_the_date_stamp_is_the_humans_for_the_client_never_writes_both() -> None:
    pasted = "[Telegram Ada id:42 2026-11-25 07:24 UTC] Ada: hello"
    assert unwrap(STAMP + pasted).text == pasted


def test_only_one_date_stamp_comes_off() -> None:
    assert unwrap(STAMP + STAMP + "hi").text == STAMP + "hi"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[Pigeon Ada id:42 Wed 2026-11-25 07:24 UTC] Ada: hello", "hello"),
        ('Weather here (untrusted metadata):\n```json\n{"rain":true}\n```\n\nhello', "hello"),
        (STAMP + 'Weather here (untrusted, for context):\n```json\n{"rain":true}\n```\n\n[ ] hello', "[ ] hello"),
    ],
)
def test_a_wrapper_that_is_not_known_comes_off_and_is_counted(text: str, words: str) -> None:
    assert (unwrap(text).text, unwrap(text).unknown) == (words, 1)


# --- repeated attempts ----------------------------------------------------------------------------

AGAIN = CONTINUE + " If an action was interrupted, inspect its state before deciding whether to retry it."


@pytest.mark.parametrize(
    "text",
    [
        STAMP + QUEUED + "deploy it\n\n" + AGAIN,
        STAMP + QUEUED + QUEUED + "deploy it\n\n" + AGAIN + "\n\n" + AGAIN,
        STAMP + QUEUED + STAMP + SENDER + "deploy it\n\n" + AGAIN,
    ],
)
def test_the_retry_wording_is_undone(text: str) -> None:
    assert (unwrap(text).text, unwrap(text).retry) == ("deploy it", True)


def test_a_retry_notice_of_its_own_has_no_words() -> None:
    assert (unwrap(STAMP + AGAIN).text, unwrap(STAMP + AGAIN).retry) == ("", True)


def test_a_new_message_after_a_failed_one_is_no_retry_and_keeps_both() -> None:
    spoken = unwrap(STAMP + QUEUED + "deploy it\n\nno, wait")
    assert (spoken.text, spoken.retry) == ("deploy it\n\nno, wait", False)


# --- the session line -----------------------------------------------------------------------------


def words_of(text: str) -> str:
    return split_runtime(text)[0]


def test_the_session_line_comes_off_the_end_only() -> None:
    assert words_of("hello" + RUNTIME) == "hello"
    assert words_of(RUNTIME.strip()) == ""
    assert words_of("see" + RUNTIME + "\nwhat is that?") == "see" + RUNTIME + "\nwhat is that?"


# --- properties -----------------------------------------------------------------------------------

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[⟦")).map(str.strip).filter(
    lambda t: not t.startswith(("Delivery:", "Active goal:", "Current message:", "Context:", CARRIER)) and CONTINUE not in t
)


@given(plain)
def test_any_words_come_back_from_any_known_wrapping(words: str) -> None:
    for wrapped in (words, STAMP + words, STAMP + SENDER + words, STAMP + QUEUED + words + "\n\n" + AGAIN):
        assert unwrap(wrapped).text == words


pieces = st.sampled_from([STAMP, SENDER, QUEUED, AGAIN, MARK, "\n", "\n\n", "```json\n", "[Image]\n", "User text:\n", "words", "---\nQueued #1\n"])


@given(st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=8).map("".join))
def test_no_text_breaks_it_and_nothing_is_made_up(text: str) -> None:
    spoken = unwrap(text)
    assert set(spoken.text) <= set(text) | {"\n"}
    assert len(spoken.text) <= len(text)
