"""What is left out of a conversation that is too long, and that it stays left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from render_help import QWEN, READ, Kept, assistant, call, request, result, system, tokenizer_of, user

from metaclaw_core.model import Message
from metaclaw_core.policy.context import choose, leave_out, units
from metaclaw_core.policy.tokens import decode


def loop(number: int, size: int = 100) -> list[Message]:
    return [assistant(call("read", f'{{"path": "{number}"}}', f"c{number}")), result(f"{number}:" + "x" * size, f"c{number}")]


def results(messages: list[Message]) -> list[int]:
    return [int(r.text.partition(":")[0]) for m in messages for r in m.tool_results]


HISTORY = [system("S"), user("first human"), *loop(1), *loop(2), *loop(3), assistant("done"), user("go on"), *loop(4), *loop(5)]


def test_the_oldest_pairs_go_first():
    chosen = choose(HISTORY, (), length=1000, target=700)
    left, dropped = leave_out(HISTORY, chosen)
    assert (results(left), dropped) == ([3, 4, 5], 2)
    assert left[:2] == HISTORY[:2]


def test_a_call_and_its_results_go_together():
    two = [user("u"), assistant(call("read", id="a"), call("read", id="b")), result("1:", "a"), result("2:", "b"), *loop(3)]
    left, dropped = leave_out(two, choose(two, (), length=100, target=90))
    assert (left, dropped) == ([two[0], *two[4:]], 1)


def test_the_first_human_message_and_what_is_new_never_go():
    left, _ = leave_out(HISTORY, choose(HISTORY, (), length=10_000, target=1))
    assert left == [HISTORY[0], HISTORY[1], user("go on"), *loop(5)]


def test_when_no_pairs_are_left_old_messages_go():
    talk = [user("first"), assistant("a" * 50), user("b" * 50), assistant("c" * 50), user("newest")]
    left, _ = leave_out(talk, choose(talk, (), length=100, target=80))
    assert left == [talk[0], *talk[2:]]


def test_what_was_left_out_stays_out_while_the_conversation_grows_and_carriers_move():
    chosen = choose(HISTORY, (), length=1000, target=700)
    moved = [*HISTORY[:2], user("carrier"), *HISTORY[2:], *loop(6)]
    assert results(leave_out(moved, chosen)[0]) == [3, 4, 5, 6]


def test_equal_calls_are_told_apart_by_their_number():
    same = [user("u"), *loop(1), *loop(1), *loop(1), *loop(2)]
    keys = [unit.key for unit in units(same)]
    assert len(set(keys)) == 4
    left, _ = leave_out(same, {keys[0]})
    assert results(left) == [1, 1, 2]


@given(
    sizes=st.lists(st.integers(0, 500), min_size=1, max_size=12),
    answers=st.sets(st.integers(0, 11)),
    length=st.integers(1, 5000),
    target=st.integers(1, 5000),
)
def test_choosing_takes_units_only_and_each_once(sizes: list[int], answers: set[int], length: int, target: int):
    messages = [system("S"), user("U")]
    for number, size in enumerate(sizes):
        messages += loop(number, size) + ([assistant("ok"), user("more")] if number in answers else [])
    chosen = choose(messages, (), length=length, target=target)
    left, dropped = leave_out(messages, chosen)
    assert dropped == len(chosen)
    assert left[:2] == messages[:2]
    assert results(left)[-1:] == [len(sizes) - 1]
    calls = [c.id for m in left for c in m.tool_calls]
    assert calls == [r.call_id for m in left for r in m.tool_results]
    assert not choose(messages, chosen, length=length, target=length)


# --- in a renderer --------------------------------------------------------------------------------


@pytest.mark.local
def test_a_prompt_is_brought_down_at_once_and_kept_so_for_the_session():
    from metaclaw_core.policy.render import Renderer

    renderer, known = Renderer(tokenizer_of(QWEN)), Kept()
    messages = [system("S"), user("first human")]
    trimmed, lengths = [], []
    for number in range(1, 20):
        messages += loop(number)
        prompt = renderer.render(request(*messages, tools=[READ]), known, max_tokens=1000)
        text = decode(tokenizer_of(QWEN), prompt.ids)
        assert "first human" in text
        assert f"{number}:xxx" in text
        trimmed.append(prompt.trimmed)
        lengths.append(len(prompt.ids))
    assert max(lengths) <= 1000
    changes = [i for i in range(1, len(trimmed)) if trimmed[i] != trimmed[i - 1]]
    assert 1 <= len(changes) <= 6  # not at every request
    assert all(lengths[i] <= 0.7 * 1000 for i in changes)
    assert trimmed == sorted(trimmed)


@pytest.mark.local
def test_another_session_starts_with_everything():
    from metaclaw_core.policy.render import Renderer

    renderer = Renderer(tokenizer_of(QWEN))
    asked = request(user("u"), *[m for n in range(8) for m in loop(n)], tools=[READ])
    assert renderer.render(asked, Kept(), max_tokens=800).trimmed > 0
    assert renderer.render(asked, Kept(), max_tokens=80_000).trimmed == 0


@pytest.mark.local
def test_what_can_not_be_left_out_may_be_too_long():
    from metaclaw_core.policy.render import Renderer, RenderError

    renderer, known = Renderer(tokenizer_of(QWEN)), Kept()
    asked = request(system("long " * 400), user("u"), *loop(1), *loop(2), tools=[READ])
    with pytest.raises(RenderError, match="the policy model takes 300 beside its reply") as e:
        renderer.render(asked, known, max_tokens=300)
    assert e.value.kind == "too_long"
    assert renderer.render(asked, known, max_tokens=80_000).trimmed == 0  # nothing was given up in vain
