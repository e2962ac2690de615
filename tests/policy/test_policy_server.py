"""The policy server as the proxy uses it: a process of its own over a real engine, five dialects, exact tokens."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from policy_help import SECONDS, TOKEN, RunningEngine, RunningPolicy, running_engine, running_policy

from metaclaw_core import routes
from metaclaw_core.model import Response, StopReason
from metaclaw_core.routes import FAILED_HEADER, Route, Served
from metaclaw_core.store import samplefile
from metaclaw_core.wire import by_name

pytestmark = pytest.mark.local

HI = [{"role": "user", "content": "Hi there"}]
CHAT = "/v1/chat/completions"
DIALECTS = ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama")
PATHS = {
    "openai_chat": CHAT,
    "openai_responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/gemini-pro:generateContent",
    "ollama": "/api/chat",
}


def asking(dialect: str, *, stream: bool, limit: int = 100) -> tuple[str, dict[str, Any]]:
    """Path and body of "Hi there" in a dialect."""
    if dialect == "gemini":
        path = PATHS[dialect].replace(":generate", ":streamGenerate") + "?alt=sse" if stream else PATHS[dialect]
        return path, {"contents": [{"role": "user", "parts": [{"text": "Hi there"}]}], "generationConfig": {"maxOutputTokens": limit}}
    body: dict[str, Any] = {"model": "asked-for", "stream": stream}
    if dialect == "openai_responses":
        return PATHS[dialect], {**body, "input": "Hi there", "max_output_tokens": limit}
    if dialect == "ollama":
        return PATHS[dialect], {**body, "messages": HI, "options": {"num_predict": limit}}
    if dialect == "openai_chat" and stream:
        body["stream_options"] = {"include_usage": True}
    return PATHS[dialect], {**body, "messages": HI, "max_tokens": limit}


def parsed(dialect: str, answer: httpx.Response, *, stream: bool) -> Response:
    assert answer.status_code == 200, answer.text
    if not stream:
        return by_name(dialect).parse_response(answer.content)
    parser = by_name(dialect).stream_parser()
    parser.feed(answer.content)
    return parser.finish()


@pytest.fixture(scope="session")
def tokenizer(chat_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_model)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text between the special tokens, which a reader of a reply does not see."""
    runs: list[list[int]] = [[]]
    for i in ids:
        if i in tokenizer.added_tokens_decoder:
            runs.append([])
        else:
            runs[-1].append(i)
    return "".join(tokenizer.decode(run) for run in runs)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_request_is_answered_in_its_own_dialect_with_the_tokens_kept(
    policy: RunningPolicy, tokenizer: Any, dialect: str, stream: bool
) -> None:
    path, body = asking(dialect, stream=stream)
    flow = f"five-{dialect}-{stream}"
    answer = parsed(dialect, policy.ask(path, body, flow), stream=stream)
    sample = policy.sample(flow)
    assert answer.complete
    assert answer.message is not None
    assert answer.message.text == text_of(tokenizer, sample["tokens"])
    prompt = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(sample["prompt_ids"]) == prompt
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(sample["prompt_ids"]), len(sample["tokens"]))
    assert (sample["klass"], sample["klass_reason"], sample["version"], sample["checkpoint"]) == ("A", None, 1, None)
    ended = sample["tokens"][-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id)  # both end a turn
    assert answer.stop_reason is (StopReason.STOP if ended else StopReason.LENGTH)
    assert sample["stop_reason"] == ("stop" if ended else "length")
    assert len(sample["logprobs"]) == sample["length"] == len(sample["tokens"]) <= 100


def test_ids_and_logprobs_equal_a_recomputation(policy: RunningPolicy, engine: RunningEngine) -> None:
    from tinker import ServiceClient, types

    for number in range(10):
        policy.ask(CHAT, {"messages": HI, "max_tokens": 40 + 60 * number}, f"recompute-{number}").raise_for_status()
    service = ServiceClient(base_url=engine.url, api_key=engine.key)
    client = service.create_sampling_client(base_model=engine.model).result()
    compared = 0
    for number in range(10):
        sample = policy.sample(f"recompute-{number}")
        ids = sample["prompt_ids"] + sample["tokens"]
        again = client.compute_logprobs(types.ModelInput.from_ints(ids)).result()[-len(sample["tokens"]) :]
        compared += len(again)
        assert max(abs(a - float(b or 0)) for a, b in zip(sample["logprobs"], again, strict=True)) < 1e-4
    service.close("success").result(30)
    assert compared > 300


def ended_reply(policy: RunningPolicy, session: str) -> tuple[str, dict[str, Any], list[dict[str, str]]]:
    """A reply that ended by itself: its sample, and the messages of a request that goes on after it."""
    for number in range(20):
        flow = f"{session}-{number}"
        answer = policy.ask(CHAT, {"messages": HI, "max_tokens": 1000}, flow, session=session).json()["choices"][0]
        if answer["finish_reason"] == "stop" and answer["message"]["content"].isascii():
            break
    said = {"role": "assistant", "content": answer["message"]["content"]}
    return flow, policy.sample(flow), [*HI, said, {"role": "user", "content": "And now?"}]


def test_the_next_request_continues_the_sampled_tokens(policy: RunningPolicy) -> None:
    _, first, more = ended_reply(policy, "reuse")
    policy.ask(CHAT, {"messages": more, "max_tokens": 8}, "reuse-next", session="reuse").raise_for_status()
    second = policy.sample("reuse-next")
    known = first["prompt_ids"] + first["tokens"]
    assert second["prompt_ids"][: len(known)] == known
    assert second["reused"] == len(first["tokens"])
    # Another session knows nothing of it: what it gets is the text, cut into tokens anew.
    policy.ask(CHAT, {"messages": more, "max_tokens": 8}, "stranger", session="another").raise_for_status()
    assert policy.sample("stranger")["reused"] == 0


def test_a_stop_string_over_a_segments_end_is_found_and_cuts_text_and_tokens(policy: RunningPolicy, tokenizer: Any) -> None:
    for seed in range(50):
        asked = {"messages": HI, "max_tokens": 150, "seed": seed, "temperature": 0.7}
        whole = policy.ask(CHAT, asked, f"free-{seed}", explore="0").json()["choices"][0]["message"]["content"]
        free = policy.sample(f"free-{seed}")["tokens"]
        # The last letter of the first segment and the first of the second.
        at = len(tokenizer.decode(free[:63]))
        stop = whole[at : at + 2]
        if len(free) > 70 and whole.find(stop) == at:
            break
    answer = policy.ask(CHAT, {**asked, "stop": ["never said", stop]}, "stop-string", explore="0").json()["choices"][0]
    sample = policy.sample("stop-string")
    assert answer["message"]["content"] == whole[:at]
    assert answer["finish_reason"] == "stop"
    assert sample["tokens"] == free[:65]
    assert (sample["segments"], sample["stop_reason"], sample["sampling"]["stop"]) == (2, "stop", stop)


def test_values_of_the_client_make_class_c(policy: RunningPolicy) -> None:
    policy.ask(CHAT, {"messages": HI, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9}, "class-c", explore="0").raise_for_status()
    sample = policy.sample("class-c")
    assert (sample["klass"], sample["klass_reason"]) == ("C", "temperature 0.5, top_p 0.9, top_k -1")
    assert sample["sampling"] == {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "max_tokens": 4, "seed": None, "stop": None}


def test_an_exploring_session_samples_at_temperature_1_whatever_is_asked(policy: RunningPolicy) -> None:
    policy.ask(CHAT, {"messages": HI, "max_tokens": 4, "temperature": 0.5}, "explore").raise_for_status()
    sample = policy.sample("explore")
    assert (sample["klass"], sample["sampling"]["temperature"]) == ("A", 1.0)


def test_a_penalty_that_is_not_applied_makes_class_c(policy: RunningPolicy) -> None:
    policy.ask(CHAT, {"messages": HI, "max_tokens": 4, "presence_penalty": 1.5}, "penalty").raise_for_status()
    assert policy.sample("penalty")["klass_reason"] == "presence_penalty was asked for"


def test_a_prompt_with_a_secret_is_answered_and_its_ids_are_not_kept(policy: RunningPolicy) -> None:
    secret = "sk-ant-abcdefghijklmnop"
    messages = [{"role": "user", "content": f"The key is {secret}"}]
    policy.ask(CHAT, {"messages": messages, "max_tokens": 4}, "secret", session="secret").raise_for_status()
    sample = policy.sample("secret")
    assert (sample["redacted"], sample["prompt_ids"], sample["tokens"], sample["logprobs"]) == (True, None, None, None)
    assert sample["length"] >= 1
    with samplefile.SampleFile(policy.home / "run" / samplefile.FILE) as file:
        assert file.replies("secret") == {}


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}])
def test_without_the_token_nothing_is_answered(policy: RunningPolicy, headers: dict[str, str]) -> None:
    answer = httpx.post(policy.url + CHAT, json={"messages": HI}, headers=headers)
    assert answer.status_code == 401


def test_a_path_of_no_dialect_is_not_found(policy: RunningPolicy) -> None:
    assert policy.ask("/v1/embeddings", {}, "none").status_code == 404


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "images"),
    "two answers": ({"messages": HI, "n": 2}, "unsupported"),
    "forced tool": ({"messages": HI, "tool_choice": "required"}, "unsupported"),
    "schema": ({"messages": HI, "response_format": {"type": "json_object"}}, "unsupported"),
    "bias": ({"messages": HI, "logit_bias": {"5": 10}}, "unsupported"),
    "logprobs": ({"messages": HI, "logprobs": True}, "unsupported"),
    "no messages": ({"model": "x"}, "unsupported"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 3000}]}, "too_long"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_can_not_be_served_is_a_503_that_sends_the_retry_upstream(policy: RunningPolicy, name: str) -> None:
    body, word = UNSERVED[name]
    answer = policy.ask(CHAT, body, f"unserved-{name}")
    assert (answer.status_code, answer.headers[FAILED_HEADER], answer.headers["retry-after"]) == (503, word, "1")
    assert answer.json()["error"]["message"]
    beat = policy.heartbeat()
    assert beat is not None
    assert beat.ready


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_failure_is_told_as_the_dialect_tells_it(policy: RunningPolicy, dialect: str) -> None:
    path, body = asking(dialect, stream=True)
    answer = policy.ask(path, body, "old", version="77")
    assert (answer.status_code, answer.headers[FAILED_HEADER]) == (503, "version")
    assert by_name(dialect).parse_error(answer.content).message == "Version 77 is not served any more."


def test_a_response_id_of_ours_brings_its_conversation(policy: RunningPolicy, tokenizer: Any) -> None:
    ask = {"model": "m", "instructions": "Be brief.", "input": "Hi there", "max_output_tokens": 200}
    first = policy.ask("/v1/responses", ask, "chain-1", principal="p", session="chain").json()
    follow = {"model": "m", "input": "And now?", "previous_response_id": first["id"], "max_output_tokens": 8}
    second = policy.ask("/v1/responses", follow, "chain-2", principal="p", session="chain").json()
    third = policy.ask("/v1/responses", {**follow, "previous_response_id": second["id"]}, "chain-3", principal="p", session="chain")
    third.raise_for_status()
    text = tokenizer.decode(policy.sample("chain-3")["prompt_ids"])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user\nAnd now?<|im_end|>") == 2
    assert text.count("<|im_start|>assistant\n") == 3
    stranger = policy.ask("/v1/responses", follow, "chain-4", principal="somebody else")
    assert (stranger.status_code, stranger.headers[FAILED_HEADER]) == (503, "history")


@pytest.mark.slow
def test_the_first_byte_never_comes_before_the_first_segment(policy: RunningPolicy, engine: RunningEngine) -> None:
    """While the engine stands still nothing is sent, not even a head."""
    policy.wait_until()
    path, body = asking("anthropic", stream=True)
    os.kill(engine.process.pid, signal.SIGSTOP)
    timer = threading.Timer(3.0, os.kill, (engine.process.pid, signal.SIGCONT))
    timer.start()
    try:
        began = time.monotonic()
        with policy.client.stream("POST", policy.url + path, json=body, headers=policy.headers("first-byte")) as answer:
            head = time.monotonic() - began
            assert answer.status_code == 200
            assert b"message_stop" in answer.read()
        assert head > 2.5
    finally:
        timer.cancel()
        os.kill(engine.process.pid, signal.SIGCONT)


def test_many_requests_at_once_are_all_answered(policy: RunningPolicy) -> None:
    answers: dict[str, httpx.Response] = {}

    def ask(flow: str) -> None:
        answers[flow] = httpx.post(policy.url + CHAT, json={"messages": HI, "max_tokens": 64}, headers=policy.headers(flow), timeout=SECONDS)

    flows = [f"many-{number}" for number in range(16)]
    threads = [threading.Thread(target=ask, args=(flow,)) for flow in flows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[flow].status_code for flow in flows] == [200] * 16
    texts = {answers[flow].json()["choices"][0]["message"]["content"] for flow in flows}
    assert len(texts) == 16
    assert len({tuple(policy.sample(flow)["tokens"]) for flow in flows}) == 16


def test_a_client_that_leaves_stops_the_sampling_and_leaves_a_sample_of_class_c(policy: RunningPolicy) -> None:
    body = {"messages": HI, "max_tokens": 1500, "stream": True}
    for number in range(20):  # until a reply does not end in its first segments
        flow = f"left-{number}"
        with policy.client.stream("POST", policy.url + CHAT, json=body, headers=policy.headers(flow)) as answer:
            for line in answer.iter_lines():
                if '"content"' in line:
                    break
        sample = policy.sample(flow)
        if sample["stop_reason"] == "aborted":
            break
    assert (sample["stop_reason"], sample["klass"], sample["klass_reason"]) == ("aborted", "C", "aborted")
    assert 0 < sample["length"] < 1500
    assert len(sample["logprobs"]) == sample["length"]


@pytest.mark.slow
def test_a_version_is_pinned_across_a_change_of_the_route(
    engine: RunningEngine, tmp_path: Path, policy: RunningPolicy
) -> None:
    from tinker import ServiceClient, types

    service = ServiceClient(base_url=engine.url, api_key=engine.key)
    training = service.create_lora_training_client(engine.model, rank=4, seed=1).result()
    data = types.Datum(
        model_input=types.ModelInput.from_ints([5, 6, 7]),
        loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0, 1.0, 1.0]},
    )
    training.forward_backward([data], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    saved = training.save_weights_for_sampler("step1", ttl_seconds=3600).result().path
    body = {"messages": HI, "max_tokens": 8}
    with running_policy(engine, tmp_path) as own:
        own.wait_until(version=1)
        own.ask(CHAT, body, "loop-1", version="1").raise_for_status()
        routes.write_route(tmp_path, Route(2, engine.model, 2, 1, (Served(1, None), Served(2, saved))))
        own.wait_until(version=2)
        own.ask(CHAT, body, "loop-2", version="1").raise_for_status()
        own.ask(CHAT, body, "next", version="2").raise_for_status()
        own.ask(CHAT, body, "unpinned").raise_for_status()
        routes.write_route(tmp_path, Route(3, engine.model, 2, 2, (Served(2, saved),)))
        deadline = time.monotonic() + SECONDS
        while (beat := own.heartbeat()) is None or 1 in beat.versions:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        gone = own.ask(CHAT, body, "loop-3", version="1")
        assert [(own.sample(flow)["version"], own.sample(flow)["checkpoint"]) for flow in ("loop-1", "loop-2", "next", "unpinned")] == [
            (1, None), (1, None), (2, saved), (2, saved),
        ]  # fmt: skip
        assert (gone.status_code, gone.headers[FAILED_HEADER]) == (503, "version")
    service.close("success").result(30)


@pytest.mark.slow
def test_a_route_for_another_model_is_not_served(engine: RunningEngine, tmp_path: Path) -> None:
    routes.write_route(tmp_path, Route(1, "another/model", 1, 1, (Served(1, None),)))
    with running_policy(engine, tmp_path) as own:
        deadline = time.monotonic() + SECONDS
        while (beat := own.heartbeat()) is None or not (beat.problem or "").startswith("The route"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = own.ask(CHAT, {"messages": HI}, "other")
        assert (answer.status_code, answer.headers[FAILED_HEADER]) == (503, "unready")


@pytest.mark.slow
def test_an_engine_that_stands_still_is_a_503_within_the_deadline_and_recovers(chat_model: Path, tmp_path: Path) -> None:
    with (
        running_engine(chat_model, tmp_path / "engine") as engine,
        running_policy(engine, tmp_path / "home", METACLAW_POLICY_FIRST_SEGMENT_TIMEOUT="1.5") as own,
    ):
        own.wait_until()
        os.kill(engine.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        answer = own.ask(CHAT, {"messages": HI, "stream": True}, "stalled")
        waited = time.monotonic() - began
        assert (answer.status_code, answer.headers[FAILED_HEADER]) == (503, "timeout")
        assert 1.4 < waited < 3.0
        beat = own.wait_until(ready=False)
        assert beat.problem == "No token came within 1.5 s."
        next_one = own.ask(CHAT, {"messages": HI}, "stalled-2")  # told at once, without another wait
        assert (next_one.status_code, next_one.headers[FAILED_HEADER]) == (503, "unready")
        os.kill(engine.process.pid, signal.SIGCONT)
        own.wait_until()
        own.ask(CHAT, {"messages": HI, "max_tokens": 4}, "recovered").raise_for_status()


@pytest.mark.slow
def test_an_engine_that_falls_silent_in_the_middle_is_told_inside_the_stream(chat_model: Path, tmp_path: Path) -> None:
    """With signs of life until then, and the sample is kept as one that has no end."""
    with running_engine(chat_model, tmp_path / "engine") as engine, running_policy(engine, tmp_path / "home") as own:
        own.wait_until()
        body = {"model": "m", "messages": HI, "max_tokens": 1500, "stream": True}
        for number in range(30):  # until the engine is stopped between two segments
            flow = f"silent-{number}"
            with own.client.stream("POST", own.url + "/v1/messages", json=body, headers=own.headers(flow)) as answer:
                pieces = answer.iter_raw()
                received = next(pieces)
                os.kill(engine.process.pid, signal.SIGSTOP)
                received += b"".join(pieces)
            os.kill(engine.process.pid, signal.SIGCONT)
            if b"message_stop" not in received:
                break
            own.wait_until()
        response = by_name("anthropic").stream_parser()
        response.feed(received)
        found = response.finish()
        assert found.error is not None
        assert not found.complete
        assert b"ping" in received
        sample = own.sample(flow)
        assert (sample["stop_reason"], sample["klass"]) == ("aborted", "C")


@pytest.mark.slow
def test_an_engine_that_was_started_anew_is_found_again(chat_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running_engine(chat_model, tmp_path / "engine", port=port) as engine:
        policy = running_policy(engine, tmp_path / "home", METACLAW_POLICY_FIRST_SEGMENT_TIMEOUT="3")
        with policy as own:
            own.wait_until()
            engine.process.kill()
            engine.process.wait()
            answer = own.ask(CHAT, {"messages": HI}, "dead")
            assert (answer.status_code, answer.headers[FAILED_HEADER]) == (503, "timeout")
            own.wait_until(ready=False)
            with running_engine(chat_model, tmp_path / "engine", port=port):
                own.wait_until()
                own.ask(CHAT, {"messages": HI, "max_tokens": 4}, "alive").raise_for_status()


@pytest.mark.slow
def test_committed_samples_survive_a_kill_and_replies_are_known_to_the_next_process(engine: RunningEngine, tmp_path: Path) -> None:
    with running_policy(engine, tmp_path) as own:
        own.wait_until()
        flow, before, more = ended_reply(own, "s")
        os.kill(own.process.pid, signal.SIGKILL)
        own.process.wait()
        assert own.sample(flow) == before
    with running_policy(engine, tmp_path) as own:
        own.wait_until()
        own.ask(CHAT, {"messages": more, "max_tokens": 4}, "after", session="s").raise_for_status()
        after = own.sample("after")
    known = before["prompt_ids"] + before["tokens"]
    assert after["prompt_ids"][: len(known)] == known
    assert after["reused"] == len(before["tokens"])


@pytest.mark.slow
def test_the_heartbeat_grows_old_where_the_server_stands_still(engine: RunningEngine, tmp_path: Path) -> None:
    with running_policy(engine, tmp_path) as own:
        own.wait_until()
        assert (beat := own.heartbeat()) is not None
        assert beat.fresh(time.time())
        os.kill(own.process.pid, signal.SIGSTOP)
        time.sleep(routes.FRESH_SECONDS + 0.2)
        assert (beat := own.heartbeat()) is not None
        assert not beat.fresh(time.time())


@pytest.mark.slow
def test_it_ends_when_stdin_closes(engine: RunningEngine, tmp_path: Path) -> None:
    with running_policy(engine, tmp_path) as own:
        own.wait_until()
        assert own.process.stdin is not None
        own.process.stdin.close()
        assert own.process.wait(timeout=15) == 0


@pytest.mark.slow
def test_it_ends_when_stdin_closes_though_the_engine_stands_still(chat_model: Path, tmp_path: Path) -> None:
    with running_engine(chat_model, tmp_path / "engine") as engine, running_policy(engine, tmp_path / "home") as own:
        own.wait_until()
        os.kill(engine.process.pid, signal.SIGSTOP)
        assert own.process.stdin is not None
        own.process.stdin.close()
        assert own.process.wait(timeout=20) == 0
