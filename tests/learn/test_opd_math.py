"""On-policy distillation: advantages by hand, and a teacher over a socket that is right, wrong or broken in one way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rl_tools import sample

from metaclaw_core.errors import ConfigError, WireError
from metaclaw_core.learn.batch import build
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.learn.llm import LLMRefused, LLMUnavailable, Retry
from metaclaw_core.learn.opd import aligned, combined, opd_advantages, reverse_kl
from metaclaw_core.learn.teacher import Teacher, TeacherUnfit, probe_ids, read_echo

# --- the arithmetic -----------------------------------------------------------------------------------------------------


def test_the_advantage_is_how_much_likelier_the_teacher_finds_a_token() -> None:
    [datum] = build([sample(1, [1, 2], [7, 8], logprobs=[-9.0, -9.0])])
    student = np.array([-9.0, -1.0, -2.0], dtype=np.float32)
    teacher = np.array([-3.0, -1.5, -0.5], dtype=np.float32)
    [(turn, values)] = opd_advantages(datum, student, teacher, beta=0.5).items()
    assert turn == 1
    assert values.tolist() == [-0.25, 0.75]
    assert reverse_kl(datum, student, teacher) == pytest.approx((0.5 - 1.5) / 2)


def test_an_advantage_is_clipped_at_5() -> None:
    [datum] = build([sample(1, [1], [7, 8])])
    values = opd_advantages(datum, np.array([-1.0, -20.0]), np.array([-9999.0, -1.0]), beta=1.0)[1]
    assert values.tolist() == [-5.0, 5.0]


def test_each_turn_of_a_merged_datum_gets_its_own_values() -> None:
    [datum] = build([sample(1, [1], [7]), sample(2, [1, 7, 3], [8, 9])])
    values = opd_advantages(datum, np.array([-1.0, -9, -2, -3]), np.array([-2.0, -9, -1, -1]), beta=1.0)
    assert {turn: array.tolist() for turn, array in values.items()} == {1: [-1.0], 2: [1.0, 2.0]}


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 2))
def test_it_equals_a_sum_over_tokens_one_by_one(seed: int, beta: float) -> None:
    rng = np.random.default_rng(seed)
    p, t = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    [datum] = build([sample(1, list(range(1, p + 1)), list(range(20, 20 + t)))])
    # Distributions over 5 tokens at each place; the sampled one is what the logprobs are of.
    logits = rng.normal(size=(2, p + t, 5))
    drawn = rng.integers(0, 5, size=p + t)
    table = [[[float(np.exp(v) / np.exp(row).sum()) for v in row] for row in model] for model in logits]
    brute = [-beta * np.log(table[0][k][drawn[k]] / table[1][k][drawn[k]]) for k in range(p, p + t)]
    student, teacher = (np.array([np.log(table[m][k][drawn[k]]) for k in range(1, p + t)]) for m in (0, 1))
    found = opd_advantages(datum, student.astype(np.float32), teacher.astype(np.float32), beta=beta)[1]
    assert found == pytest.approx(np.clip(brute, -5, 5), abs=1e-4)


def test_teacher_values_are_aligned_with_the_next_token_or_not_used() -> None:
    found = aligned([None, -1.0, -2.0], 2)
    assert found is not None
    assert found.tolist() == [-1.0, -2.0]
    assert aligned([None, -1.0], 2) is None
    assert aligned([None, -1.0, -2.0, -3.0], 2) is None
    assert aligned([None, None, -2.0], 2) is None
    assert aligned([None, float("nan"), -2.0], 2) is None


def test_lengths_that_differ_are_refused() -> None:
    [datum] = build([sample(1, [1], [7, 8])])
    with pytest.raises(ValueError, match=r"the datum is \(2,\), student \(2,\), teacher \(3,\)"):
        opd_advantages(datum, np.zeros(2), np.zeros(3), beta=1.0)


def test_judge_and_teacher_add_up_and_either_may_be_alone() -> None:
    both = combined({1: 1.0, 2: -0.5}, {1: np.array([-0.25, 0.5], np.float32), 3: np.array([2.0], np.float32)})
    assert {turn: np.asarray(v).tolist() for turn, v in both.items()} == {1: [0.75, 1.5], 2: -0.5, 3: [2.0]}


# --- the teacher ----------------------------------------------------------------------------------------------------------

IDS = [3, 4, 5]


def echo(ids: list[int], *, drawn: int = 0, words: str = "abcdefghij", **more: Any) -> dict[str, Any]:
    """What vLLM answers: token n has logprob -n/10."""
    logprobs = {
        "tokens": [words[i] for i in ids] + ["!"] * drawn,
        "token_logprobs": [None, *(-i / 10 for i in ids[1:])] + [-9.0] * drawn,
    }
    choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": "length"}
    return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": drawn}, **more}


def test_an_echo_is_read_by_id() -> None:
    assert read_echo(echo(IDS), IDS, 0).logprobs == (None, -0.4, -0.5)
    assert read_echo(echo(IDS, drawn=1), IDS, 1).logprobs == (None, -0.4, -0.5)
    assert read_echo(echo(IDS), IDS, 1).logprobs == (None, -0.4, -0.5)  # the drawn one is not shown
    assert read_echo(echo(IDS), IDS, 0).tokens == ("d", "e", "f")


def without(path: str) -> dict[str, Any]:
    answer = echo(IDS, drawn=1)
    at: Any = answer
    *folders, last = path.split(".")
    for name in folders:
        at = at[int(name) if name.isdigit() else name]
    del at[last]
    return answer


@pytest.mark.parametrize(
    ("answer", "drawn", "expected"),
    [
        (echo([3, 4]), 0, "it holds 2 logprobs for 3 ids"),
        (echo([3, 4, 5, 6]), 0, "it holds 4 logprobs for 3 ids"),
        (echo([3, 4, 5, 6]), 1, "it counts 4 prompt tokens where 3 ids were sent"),
        (echo([3, 4]) | {"usage": None}, 0, "it holds 2 logprobs"),
        (without("usage"), 1, "it does not say how many"),
        (without("choices.0.logprobs"), 1, "no logprobs of the prompt"),
        ({"choices": []}, 0, "no logprobs of the prompt"),
        ({"choices": [{"logprobs": None}]}, 0, "no logprobs of the prompt"),
        ({"choices": [{"logprobs": {"token_logprobs": [None, None, -1.0]}}]}, 0, "missing or no number"),
        ({"choices": [{"logprobs": {"token_logprobs": [None, 5.78, -1.0]}}]}, 0, "missing or no number"),
        ({"choices": [{"logprobs": {"token_logprobs": [None, True, -1.0]}}]}, 0, "missing or no number"),
        (
            {"choices": [{"logprobs": {"token_logprobs": [None, -1.0, -1.0]}, "prompt_token_ids": [1, 3, 4]}]},
            0,
            "other ids than were sent",
        ),
    ],
)
def test_an_echo_that_is_not_provably_one_value_per_id_is_not_used(answer: Any, drawn: int, expected: str) -> None:
    with pytest.raises(WireError, match=expected):
        read_echo(answer, IDS, drawn)


class Letters:
    """A tokenizer: token n is the nth letter; the first stands for no text."""

    def __init__(self, words: str = "\x00bcdefghij") -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.words[i] for i in token_ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self.words.index(c) for c in text]


type Reply = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def serving(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers by `reply`; its base URL, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body | {"path": self.path, "authorization": self.headers["authorization"]})
            status, answer = reply(body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def teacher_at(url: str) -> Teacher:
    return Teacher(Endpoint(url, "big", "k-0123456789"), retry=Retry(3, 0.01, 0.02, 0.0), timeout_s=5.0)


async def test_exact_ids_are_sent_and_nothing_is_generated() -> None:
    with serving(lambda body: (200, echo(body["prompt"]))) as (url, asked):
        async with teacher_at(url) as teacher:
            taught = await teacher.score(np.array(IDS, dtype=np.int32))  # type: ignore[arg-type]
    assert taught.logprobs == (None, -0.4, -0.5)
    [request] = asked
    assert request["path"] == "/v1/completions"
    assert request["authorization"] == "Bearer k-0123456789"
    assert {k: request[k] for k in ("model", "prompt", "max_tokens", "echo", "logprobs", "temperature")} == {
        "model": "big",
        "prompt": [3, 4, 5],
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
        "temperature": 1.0,
    }


async def test_a_server_that_must_generate_draws_one_token_that_is_thrown_away() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if body["max_tokens"] == 0:
            return 400, {"error": {"message": "max_tokens must be at least 1"}}
        return 200, echo(body["prompt"], drawn=1)

    with serving(reply) as (url, asked):
        async with teacher_at(url) as teacher:
            assert (await teacher.score(IDS)).logprobs == (None, -0.4, -0.5)
            assert (await teacher.score(IDS)).logprobs == (None, -0.4, -0.5)
    assert [request["max_tokens"] for request in asked] == [0, 1, 1]


async def test_a_prompt_that_is_too_long_is_dropped_with_the_server_s_words() -> None:
    with serving(lambda body: (400, {"error": "context length is 2"})) as (url, _):
        async with teacher_at(url) as teacher:
            taught = await teacher.score(IDS)
    assert taught.logprobs is None
    assert "answered 400" in str(taught.problem)
    assert "context length is 2" in str(taught.problem)


async def test_an_answer_of_another_length_drops_the_turn() -> None:
    with serving(lambda body: (200, echo(body["prompt"][1:]))) as (url, _):
        async with teacher_at(url) as teacher:
            taught = await teacher.score(IDS)
    assert taught.logprobs is None
    assert "it holds 2 logprobs for 3 ids" in str(taught.problem)


async def test_a_wrong_key_is_no_fault_of_the_prompt_and_is_not_shown() -> None:
    with serving(lambda body: (401, {"error": "bad key k-0123456789"})) as (url, asked):
        async with teacher_at(url) as teacher:
            with pytest.raises(LLMRefused, match="answered 401") as caught:
                await teacher.score(IDS)
    assert len(asked) == 1
    assert "k-0123456789" not in str(caught.value)


async def test_a_busy_server_is_asked_again() -> None:
    replies = iter([(503, {}), (429, {})])
    with serving(lambda body: next(replies, (200, echo(body["prompt"])))) as (url, asked):
        async with teacher_at(url) as teacher:
            assert (await teacher.score(IDS)).logprobs is not None
    assert len(asked) == 3


async def test_a_server_that_is_gone_is_unavailable() -> None:
    with serving(lambda body: (200, {})) as (url, _):
        pass
    async with teacher_at(url) as teacher:
        with pytest.raises(LLMUnavailable, match="can't be reached"):
            await teacher.score(IDS)


async def test_a_teacher_of_the_same_tokenizer_is_fit() -> None:
    with serving(lambda body: (200, echo(body["prompt"], words="\x00bcdefghij"))) as (url, asked):
        async with teacher_at(url) as teacher:
            await teacher.check(Letters())
    assert asked[0]["prompt"] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


async def test_a_teacher_of_another_tokenizer_is_refused_and_the_token_is_named() -> None:
    with serving(lambda body: (200, echo(body["prompt"], words="\x00bcdeXghij"))) as (url, _):
        async with teacher_at(url) as teacher:
            with pytest.raises(TeacherUnfit, match=r"another tokenizer: token 5 is 'X' there and 'f' in rl.model"):
                await teacher.check(Letters())


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (lambda body: (400, {"error": "token id 9 is out of vocabulary"}), "does not take the student's token ids"),
        (lambda body: (200, {"choices": [{"text": "hi"}]}), "it must serve|It must serve /completions"),
        (
            lambda body: (200, {"choices": [{"logprobs": {"token_logprobs": [None] + [-1.0] * 8}}]}),
            "does not say its tokens' text",
        ),
    ],
)
async def test_a_teacher_that_can_t_be_checked_is_refused(reply: Reply, expected: str) -> None:
    with serving(reply) as (url, _):
        async with teacher_at(url) as teacher:
            with pytest.raises(TeacherUnfit, match=expected):
                await teacher.check(Letters())


def test_probes_are_spread_over_the_vocabulary() -> None:
    tokenizer = Letters("".join(chr(33 + n % 94) if n < 94 else chr(300 + n) for n in range(2_000)))
    assert probe_ids(tokenizer, 10)[0] == 0
    assert all(id_ < 94 for id_ in probe_ids(tokenizer, 10))
    assert len(probe_ids(Letters("".join(chr(33 + n) for n in range(94))), 10)) == 10


def test_a_chat_address_is_no_teacher() -> None:
    with pytest.raises(ConfigError, match="must be a base with /completions"):
        Teacher(Endpoint("http://127.0.0.1:9/v1/chat/completions", "big", ""))
