from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from engine_help import Client, RunningEngine, ids

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def path(client: Client) -> str:
    """Weights that answer "hi" with "yes, sir" and then end their turn."""
    import numpy as np
    import tinker

    prompt = [1, *ids("user\nhi"), 2, *ids("\n"), 1, *ids("assistant\n")]
    full = [*prompt, *ids("yes, sir"), 2]
    weights = np.asarray([0.0] * (len(prompt) - 1) + [1.0] * 9, dtype=np.float32)
    inputs: Any = {"target_tokens": np.asarray(full[1:]), "weights": weights}
    training = client.train(rank=8)
    for _ in range(40):
        lesson = tinker.Datum(model_input=tinker.ModelInput.from_ints(full[:-1]), loss_fn_inputs=inputs)
        training.forward_backward([lesson], "cross_entropy")
        training.optim_step(tinker.AdamParams(learning_rate=1e-2, eps=1e-8)).result(60)
    return str(training.save_weights_for_sampler("polite").result(60).path)


def post(engine: RunningEngine, what: str, body: dict[str, Any], key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key or engine.key}"}
    return httpx.post(f"{engine.url}/oai/api/v1/{what}", json=body, headers=headers, timeout=60, trust_env=False)


def chat(path: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": path, "messages": messages, "temperature": 0, "max_tokens": 20, "stop": [], "n": 1, **more}


def test_a_chat_by_checkpoint_path_is_answered_in_openais_shape(engine: RunningEngine, path: str) -> None:
    body = chat(path, logprobs=True, top_logprobs=2, return_token_ids=True)
    body["stop"] = "<|im_end|>"
    answer = post(engine, "chat/completions", body).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "yes, sir"}
    assert choice["finish_reason"] == "stop"
    assert choice["prompt_token_ids"] == [1, *ids("user\nhi"), 2, *ids("\n"), 1, *ids("assistant\n")]
    assert choice["token_ids"] == [*ids("yes, sir"), 2]
    assert answer["usage"]["prompt_tokens"] == len(choice["prompt_token_ids"])
    assert answer["usage"]["completion_tokens"] == 9
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "y"
    assert first["top_logprobs"][0]["logprob"] == first["logprob"]
    assert -0.5 < first["logprob"] < 0


def test_a_stream_gives_the_same_text_in_pieces_and_usage_last(engine: RunningEngine, path: str) -> None:
    body = chat(path, stream=True, stream_options={"include_usage": True}, stop="ir")
    events = [line.removeprefix("data: ") for line in post(engine, "chat/completions", body).text.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    assert "".join(deltas) == "yes, s"
    assert len([delta for delta in deltas if delta]) > 3
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_a_completion_echoes_the_logprobs_of_exact_token_ids(engine: RunningEngine, client: Client, path: str) -> None:
    import tinker

    prompt = ids("score these tokens")
    body = {"model": path, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 1}
    choice = post(engine, "completions", body).json()["choices"][0]
    assert choice["text"] == "score these tokens"
    assert choice["logprobs"]["tokens"] == list("score these tokens")
    assert choice["logprobs"]["token_logprobs"][0] is None
    scored = client.sampler(path).compute_logprobs(tinker.ModelInput.from_ints(prompt)).result(60)
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(scored[1:], abs=1e-5)
    assert choice["prompt_logprobs"][0] is None
    assert [entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], prompt[1:], strict=True)] == (
        pytest.approx(scored[1:], abs=1e-5)
    )


def test_several_prompts_and_samples_are_numbered_through(engine: RunningEngine) -> None:
    body = {"model": engine.model, "prompt": ["ab", "cd"], "max_tokens": 3, "n": 2, "seed": 1, "logprobs": 2}
    answer = post(engine, "completions", body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [len(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"]] == [3, 3, 3, 3]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("what", "change", "status", "message"),
    [
        ("chat/completions", {"model": "tinker://nobody/sampler_weights/x"}, 404, "no checkpoint tinker://nobody"),
        ("chat/completions", {"model": "gpt-9"}, 404, "gpt-9 is not served here"),
        ("chat/completions", {"messages": []}, 400, "messages must be a list"),
        ("chat/completions", {"logit_bias": {"1": 5}}, 400, "logit_bias"),
        ("chat/completions", {"tool_choice": "required"}, 400, "forced tool_choice"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "reads text only, not image_url",
        ),
        ("completions", {"prompt": {}}, 400, "prompt must be text"),
        ("completions", {"prompt": [7, 100000]}, 400, "id outside"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    engine: RunningEngine, what: str, change: dict[str, Any], status: int, message: str
) -> None:
    response = post(engine, what, {**chat(engine.model), **change})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_no_request_is_answered_without_the_key(engine: RunningEngine) -> None:
    assert post(engine, "chat/completions", chat(engine.model), key="tml-wrong").status_code == 401
    assert httpx.get(f"{engine.url}/api/v1/get_server_capabilities", trust_env=False).status_code == 401
    ok = httpx.get(f"{engine.url}/api/v1/healthz", headers={"X-API-Key": engine.key}, trust_env=False)
    assert ok.json() == {"status": "ok"}


def test_a_path_that_is_not_served_is_named(engine: RunningEngine) -> None:
    response = httpx.post(f"{engine.url}/api/v1/publish", headers={"X-API-Key": engine.key}, trust_env=False)
    assert response.status_code == 404
    assert response.json() == {"detail": "The engine doesn't serve POST /api/v1/publish."}


def test_models_lists_the_base_and_what_can_be_sampled(engine: RunningEngine, path: str) -> None:
    headers = {"Authorization": f"Bearer {engine.key}"}
    listed = httpx.get(f"{engine.url}/oai/api/v1/models", headers=headers, trust_env=False).json()["data"]
    assert {engine.model, path} <= {model["id"] for model in listed}


