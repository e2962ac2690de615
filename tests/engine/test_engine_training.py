from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from engine_help import Client, RunningEngine, datum, ids

if TYPE_CHECKING:
    import tinker

pytestmark = pytest.mark.local


def adam(rate: float = 1e-2, **more: float) -> tinker.AdamParams:
    import tinker

    return tinker.AdamParams(learning_rate=rate, eps=1e-8, **more)


def logprobs(training: Any, *texts: str) -> Any:
    result = training.forward([datum(text) for text in texts], "cross_entropy").result(60)
    return np.concatenate([out["logprobs"].to_numpy() for out in result.loss_fn_outputs])


def learn(training: Any, text: str, steps: int, **more: float) -> None:
    for _ in range(steps):
        training.forward_backward([datum(text)], "cross_entropy")
        training.optim_step(adam(**more)).result(60)


OLD = [-1.0, -2.0, -0.5, -3.0]  # the sampler's logprobs of "bcde" after "a"
GAIN = [0.0, 1.0, -1.0, 0.5]


def reference(name: str, now: Any, config: dict[str, float]) -> float:
    """The sums of the losses module, in numpy, written again from the documentation."""
    old, gain = np.asarray(OLD), np.asarray(GAIN)
    ratio = np.exp(now - old)
    low, high = config.get("clip_low_threshold", math.nan), config.get("clip_high_threshold", math.nan)
    value = {
        "importance_sampling": lambda: -(ratio * gain),
        "ppo": lambda: -np.minimum(ratio * gain, np.clip(ratio, low, high) * gain),
        "cispo": lambda: -(np.clip(ratio, low, high) * now * gain),
        "dro": lambda: -(now * gain - 0.5 * config["beta"] * (now - old) ** 2),
    }[name]()
    return float(value.sum())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 2.0}),
        ("dro", {"beta": 0.05}),
    ],
)
def test_a_policy_loss_is_the_sum_its_definition_gives(client: Client, name: Any, config: dict[str, float]) -> None:
    training = client.train()
    now = logprobs(training, "abcde").astype(np.float64)
    sample = datum("abcde", logprobs=OLD, advantages=GAIN)
    result = training.forward_backward([sample, sample], name, config or None).result(60)
    assert result.metrics["loss:sum"] == pytest.approx(2 * reference(name, now, config), rel=1e-4)
    assert [out["logprobs"].to_numpy().shape for out in result.loss_fn_outputs] == [(4,), (4,)]
    assert result.loss_fn_outputs[1]["elementwise_loss"].to_numpy().sum() * 2 == pytest.approx(
        result.metrics["loss:sum"], rel=1e-4
    )


def test_data_of_several_lengths_come_back_in_their_order(client: Client) -> None:
    training = client.train()
    together = logprobs(training, "abc", "a longer text", "xy")
    apart = np.concatenate([logprobs(training, text) for text in ("abc", "a longer text", "xy")])
    assert together.shape == (2 + 12 + 1,)
    assert np.abs(together - apart).max() < 1e-5


def test_weights_choose_what_counts_and_may_be_fractions(client: Client) -> None:
    training = client.train()
    now = logprobs(training, "abcd")
    result = training.forward([datum("abcd", weights=[0.0, 1.0, 0.5])], "cross_entropy").result(60)
    assert result.metrics["loss:sum"] == pytest.approx(-float(now[1] + 0.5 * now[2]), rel=1e-5)


def test_a_soft_target_weighs_several_tokens_at_each_position(client: Client) -> None:
    from tinker import types

    training = client.train()
    a, b = ids("ab")
    inputs: Any = {
        "target_tokens": np.asarray([[a, b], [b, a]], dtype=np.int64),
        "weights": np.asarray([[0.75, 0.25], [1.0, 0.0]], dtype=np.float32),
    }
    soft = types.Datum(model_input=types.ModelInput.from_ints(ids("xy")), loss_fn_inputs=inputs)
    result = training.forward([soft], "cross_entropy").result(60)
    out = result.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert out.shape == (2, 2)
    assert result.metrics["loss:sum"] == pytest.approx(-float((out * inputs["weights"]).sum()), rel=1e-5)


def test_a_loss_of_the_clients_own_is_trained_through_cross_entropy(client: Client) -> None:
    training = client.train()
    before = logprobs(training, "abcd")

    def own(data: Any, found: Any) -> tuple[Any, dict[str, float]]:
        return -sum(lp.sum() for lp in found), {"mine": 1.0}

    result = training.forward_backward_custom([datum("abcd")], own).result(60)
    training.optim_step(adam()).result(60)
    assert result.metrics["loss:sum"] == pytest.approx(-float(before.sum()), rel=1e-5)
    assert logprobs(training, "abcd").sum() > before.sum()


def test_training_on_a_text_makes_it_likely(client: Client) -> None:
    training = client.train(rank=8)
    before = logprobs(training, "hello there").mean()
    learn(training, "hello there", 25)
    after = logprobs(training, "hello there").mean()
    assert before < -3
    assert after > -0.5


def test_the_gradient_norm_is_reported_and_clipped(client: Client) -> None:
    free, clipped = client.train(), client.train()
    for training, limit in ((free, 0.0), (clipped, 1e-9)):
        training.forward_backward([datum("abc")], "cross_entropy")
        result = training.optim_step(adam(grad_clip_norm=limit)).result(60)
        assert result.metrics is not None
        assert result.metrics["grad_norm:mean"] > 1
    # AdamW divides by the gradient's size, but not below eps: a gradient of 1e-9 moves a tenth at most.
    start = logprobs(client.train(), "abc")
    assert np.abs(logprobs(clipped, "abc") - start).max() < 0.2 * np.abs(logprobs(free, "abc") - start).max()


def test_training_resumed_from_a_state_is_the_training_that_went_on(client: Client) -> None:
    training = client.train()
    learn(training, "the first part", 3)
    path = training.save_state("middle").result(60).path
    learn(training, "the second part", 3)
    resumed = client.service.create_training_client_from_state_with_optimizer(path).result(60)
    learn(resumed, "the second part", 3)
    whole = logprobs(training, "the second part", "the first part")
    again = logprobs(resumed, "the second part", "the first part")
    assert np.abs(whole - again).max() <= 1e-6
    # Without the optimizer's memory it is another training.
    bare = client.service.create_training_client_from_state(path).result(60)
    learn(bare, "the second part", 3)
    assert np.abs(whole - logprobs(bare, "the second part", "the first part")).max() > 1e-3
    assert bare.get_info().lora_rank == 4


def test_two_clients_at_once_do_not_disturb_each_other(engine: RunningEngine, client: Client) -> None:
    from tinker import types

    prompt = types.ModelInput.from_ints([70, 71, 72, 73])

    def work(session: Client, text: str, seed: int) -> tuple[Any, list[int]]:
        training = session.train(seed)
        learn(training, text, 4)
        path = training.save_weights_for_sampler("end").result(60).path
        drawn = session.sampler(path).sample(prompt, 1, types.SamplingParams(max_tokens=12, seed=5)).result(60)
        return logprobs(training, text), list(drawn.sequences[0].tokens)

    alone = [work(client, "one of them", 1), work(client, "the other one", 2)]
    other = engine.service()
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(work, client, "one of them", 1)
            second = pool.submit(work, Client(other, engine.model), "the other one", 2)
            together = [first.result(120), second.result(120)]
    finally:
        other.close("success").result(60)
    for (lp_alone, drawn_alone), (lp, drawn) in zip(alone, together, strict=True):
        assert np.array_equal(lp_alone, lp)
        assert drawn_alone == drawn


def test_a_finished_session_is_forgotten(engine: RunningEngine) -> None:
    from tinker import NotFoundError

    service, keeper = engine.service(), engine.rest()
    run = Client(service, engine.model).train().model_id
    assert keeper.get_training_run(run).result(60).lora_rank == 4
    service.close("success").result(60)
    with pytest.raises(NotFoundError, match="no training run"):
        keeper.get_training_run(run).result(60)


@pytest.mark.parametrize(
    ("loss", "config", "inputs", "message"),
    [
        ("gspo", None, {"logprobs": OLD, "advantages": GAIN}, "'gspo' is not served here; known are cross_entropy, imp"),
        ("ppo", {"clip_high": 1.2}, {"logprobs": OLD, "advantages": GAIN}, "ppo has no loss_fn_config clip_high; it takes clip_low"),
        ("dro", None, {"logprobs": OLD, "advantages": GAIN}, "dro needs loss_fn_config beta"),
        ("ppo", None, {"logprobs": OLD}, "datum 0: ppo takes advantages, logprobs, target_tokens, not logprobs, target_tokens"),
        ("importance_sampling", None, {"logprobs": OLD[:2], "advantages": GAIN}, r"datum 0: logprobs has the shape \(2,\)"),
        ("cross_entropy", None, {"weights": OLD, "mask": GAIN}, "datum 0: cross_entropy takes target_tokens, weights, not mask"),
        ("importance_sampling", None, {"logprobs": [-900.0] * 4, "advantages": GAIN}, "The loss is (inf|nan)"),
    ],
)
def test_wrong_data_fail_with_a_sentence_that_names_them(
    client: Client, loss: Any, config: Any, inputs: dict[str, list[float]], message: str
) -> None:
    from tinker import RequestFailedError

    with pytest.raises(RequestFailedError, match=message) as caught:
        client.train().forward_backward([datum("abcde", **inputs)], loss, config).result(60)
    assert caught.value.category == "user"


def test_a_failed_call_leaves_no_gradient(client: Client) -> None:
    from tinker import RequestFailedError

    training = client.train()
    bad = datum("abcde", logprobs=[-900.0] * 4, advantages=GAIN)
    with pytest.raises(RequestFailedError, match="No gradient of this call was kept"):
        training.forward_backward([datum("abcde", logprobs=OLD, advantages=GAIN), bad], "importance_sampling").result(60)
    with pytest.raises(RequestFailedError, match="no gradients to apply"):
        training.optim_step(adam()).result(60)


def test_tokens_of_another_vocabulary_are_refused(client: Client) -> None:
    from tinker import RequestFailedError, types

    inputs: Any = {"target_tokens": np.asarray([1, 2]), "weights": np.ones(2, dtype=np.float32)}
    alien = types.Datum(model_input=types.ModelInput.from_ints([5, 99999]), loss_fn_inputs=inputs)
    with pytest.raises(RequestFailedError, match=r"model_input has an id outside 0…258"):
        client.train().forward([alien], "cross_entropy").result(60)


def test_what_does_not_exist_is_not_found(client: Client) -> None:
    from tinker import NotFoundError

    with pytest.raises(NotFoundError, match="llama is not served here; this engine serves"):
        client.service.create_lora_training_client("llama").result(60)
    with pytest.raises(NotFoundError, match="no checkpoint tinker://nobody/weights/x"):
        client.service.create_training_client_from_state("tinker://nobody/weights/x").result(60)


def test_only_a_state_can_be_resumed(client: Client) -> None:
    from tinker import BadRequestError, RequestFailedError

    training = client.train()
    path = training.save_weights_for_sampler("only-sampling").result(60).path
    with pytest.raises(BadRequestError, match="training goes on from …/weights/… only"):
        client.service.create_training_client_from_state(path).result(60)
    fresh = training.save_state("before-any-step").result(60).path
    with pytest.raises(RequestFailedError, match="it has no optimizer state"):
        client.service.create_training_client_from_state_with_optimizer(fresh).result(60)


def test_a_name_is_taken_once_unless_overwritten(client: Client) -> None:
    from tinker import RequestFailedError

    training = client.train()
    training.save_state("last").result(60)
    with pytest.raises(RequestFailedError, match="exists already; save with overwrite=True"):
        training.save_state("last").result(60)
    assert training.save_state("last", overwrite=True).result(60).path.endswith("/weights/last")


def test_checkpoints_are_listed_described_limited_and_deleted(engine: RunningEngine, client: Client) -> None:
    from tinker import NotFoundError

    rest, training = engine.rest(), client.train()
    state = training.save_state("s", user_metadata={"why": "test"}).result(60).path
    weights = training.save_weights_for_sampler("w", ttl_seconds=7200).result(60).path
    listed = {c.tinker_path: c for c in rest.list_checkpoints(training.model_id).result(60).checkpoints}
    assert listed[state].checkpoint_type == "training"
    assert listed[state].user_metadata == {"why": "test"}
    assert listed[state].expires_at is None
    assert listed[weights].checkpoint_type == "sampler"
    assert listed[weights].expires_at is not None
    assert weights in {c.tinker_path for c in rest.list_user_checkpoints().result(60).checkpoints}
    info = rest.get_weights_info_by_tinker_path(state).result(60)
    assert (info.base_model, info.lora_rank, info.train_mlp) == (engine.model, 4, True)
    rest.set_checkpoint_ttl_from_tinker_path(weights, None).result(60)
    rest.delete_checkpoint_from_tinker_path(state).result(60)
    left = rest.list_checkpoints(training.model_id).result(60).checkpoints
    assert [(c.tinker_path, c.expires_at) for c in left] == [(weights, None)]
    with pytest.raises(NotFoundError):
        rest.delete_checkpoint_from_tinker_path(state).result(60)
