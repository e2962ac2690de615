from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from engine_help import Client, RunningEngine, datum, ids

if TYPE_CHECKING:
    from tinker import SampleResponse

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def trained(client: Client) -> Any:
    """A training client whose weights are far from the base model's."""
    import tinker

    training = client.train(rank=4)
    for _ in range(3):
        training.forward_backward([datum("some words to learn")], "cross_entropy")
        training.optim_step(tinker.AdamParams(learning_rate=3e-2, eps=1e-8)).result(60)
    return training


@pytest.fixture(scope="module")
def path(trained: Any) -> str:
    return str(trained.save_weights_for_sampler("trained").result(60).path)


def draw(sampler: Any, prompt: list[int], samples: int = 1, **params: Any) -> SampleResponse:
    import tinker

    extra = {k: params.pop(k) for k in list(params) if "logprobs" in k}
    result: SampleResponse = sampler.sample(
        tinker.ModelInput.from_ints(prompt), samples, tinker.SamplingParams(**params), **extra
    ).result(60)
    return result


def tokens(response: SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def plain_logits(engine: RunningEngine, path: str, full: list[int], folder: Path) -> Any:
    """(T, V) from transformers alone: the base model with the exported adapter added to its weights."""
    import json

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from metaclaw_core.engine.checkpoints import Checkpoints
    from metaclaw_core.engine.export import export

    assert export(Checkpoints(engine.root), path, folder) == 2 * 7 + 1
    model: Any = AutoModelForCausalLM.from_pretrained(engine.model)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name in [n for n in weights if n.endswith(".lora_A.weight")]:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            b = weights[name.replace("lora_A", "lora_B")]
            layer.weight += config["lora_alpha"] / config["r"] * (b @ weights[name])
        return model(torch.tensor([full])).logits[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_plain_transformers_at_that_temperature(
    engine: RunningEngine, client: Client, trained: Any, path: str, temperature: float, tmp_path: Path
) -> None:
    prompt = ids("some words")
    sequence = draw(client.sampler(path), prompt, max_tokens=40, temperature=temperature, seed=3).sequences[0]
    full = prompt + list(sequence.tokens)
    expected = (plain_logits(engine, path, full, tmp_path / "peft") / temperature).log_softmax(-1)
    here = [float(expected[len(prompt) - 1 + i, token]) for i, token in enumerate(sequence.tokens)]
    assert np.abs(np.asarray(sequence.logprobs) - here).max() < 1e-5
    if temperature == 1.0:
        inputs: Any = {"target_tokens": np.asarray(full[1:]), "weights": np.zeros(len(full) - 1, dtype=np.float32)}
        import tinker

        own = tinker.Datum(model_input=tinker.ModelInput.from_ints(full[:-1]), loss_fn_inputs=inputs)
        out = trained.forward([own], "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"].to_numpy()
        assert np.abs(out[-40:] - np.asarray(sequence.logprobs)).max() < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers the old way
def test_the_exported_adapter_loads_with_peft(engine: RunningEngine, client: Client, path: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    from metaclaw_core.engine.checkpoints import Checkpoints
    from metaclaw_core.engine.errors import EngineError
    from metaclaw_core.engine.export import export

    full = ids("some words to learn")
    export(Checkpoints(engine.root), path, tmp_path)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(engine.model), tmp_path)
    with torch.no_grad():
        logprobs = model(torch.tensor([full])).logits[0].log_softmax(-1)
    import tinker

    scored = client.sampler(path).compute_logprobs(tinker.ModelInput.from_ints(full)).result(60)
    assert scored[0] is None
    expected = [float(logprobs[i, token]) for i, token in enumerate(full[1:])]
    assert np.abs(np.asarray(scored[1:], dtype=np.float64) - expected).max() < 1e-5
    with pytest.raises(EngineError, match="holds an adapter already"):
        export(Checkpoints(engine.root), path, tmp_path)


def test_weights_saved_by_name_and_in_memory_sample_alike(client: Client, trained: Any, path: str) -> None:
    memory = trained.save_weights_and_get_sampling_client().result(60)
    prompt = ids("some")
    assert tokens(draw(memory, prompt, max_tokens=16, seed=1)) == tokens(draw(client.sampler(path), prompt, max_tokens=16, seed=1))
    assert tokens(draw(memory, prompt, max_tokens=16, seed=1)) != tokens(draw(client.sampler(), prompt, max_tokens=16, seed=1))


def test_a_seed_gives_the_same_tokens_and_its_samples_differ(client: Client) -> None:
    sampler, prompt = client.sampler(), ids("abc")
    first, second = (tokens(draw(sampler, prompt, 3, max_tokens=12, seed=9)) for _ in range(2))
    assert first == second
    assert first[0] != first[1] != first[2]
    assert tokens(draw(sampler, prompt, max_tokens=12)) != tokens(draw(sampler, prompt, max_tokens=12))


def test_requests_of_all_lengths_at_once_give_what_each_gives_alone(client: Client, path: str) -> None:
    import tinker

    samplers = client.sampler(path), client.sampler()
    jobs = [(samplers[i % 2], ids("abcdefgh" * 8)[i : 7 * i + 4], 5 + 3 * i) for i in range(8)]
    alone = [draw(sampler, prompt, max_tokens=most, seed=i) for i, (sampler, prompt, most) in enumerate(jobs)]
    futures = [
        sampler.sample(tinker.ModelInput.from_ints(prompt), 1, tinker.SamplingParams(max_tokens=most, seed=i))
        for i, (sampler, prompt, most) in enumerate(jobs)
    ]
    for one, future in zip(alone, futures, strict=True):
        other = future.result(60)
        assert tokens(other) == tokens(one)
        assert np.abs(np.asarray(other.sequences[0].logprobs) - np.asarray(one.sequences[0].logprobs)).max() < 1e-5


def test_a_known_prefix_is_not_computed_again_and_changes_nothing(client: Client) -> None:
    sampler, prompt = client.sampler(), ids("a prompt that nobody else in these tests has used")
    first = draw(sampler, prompt, max_tokens=30, temperature=0.0)
    again = draw(sampler, prompt, max_tokens=30, temperature=0.0)
    assert (first.prompt_cache_hit_tokens, again.prompt_cache_hit_tokens) == (0, len(prompt) - 1)
    assert tokens(first) == tokens(again)
    longer = prompt + tokens(first)[0] + ids(" and on")
    assert draw(sampler, longer, max_tokens=1).prompt_cache_hit_tokens == len(prompt) + 29
    # Other weights share nothing.
    assert draw(client.sampler(), [*prompt[:20], 5], max_tokens=1).prompt_cache_hit_tokens == 20


def test_segments_of_a_reply_are_the_reply(client: Client) -> None:
    sampler, prompt = client.sampler(), ids("once upon")
    whole = tokens(draw(sampler, prompt, max_tokens=24, temperature=0.0))[0]
    grown: list[int] = []
    for _ in range(4):
        grown += tokens(draw(sampler, prompt + grown, max_tokens=6, temperature=0.0))[0]
    assert grown == whole


def test_greedy_is_what_the_narrowest_top_k_and_top_p_give(client: Client) -> None:
    sampler, prompt = client.sampler(), ids("xyz")
    greedy = tokens(draw(sampler, prompt, max_tokens=10, temperature=0.0))
    assert tokens(draw(sampler, prompt, max_tokens=10, top_k=1)) == greedy
    assert tokens(draw(sampler, prompt, max_tokens=10, top_p=1e-6)) == greedy


def test_prompt_logprobs_come_with_their_likeliest_alternatives(client: Client) -> None:
    prompt = ids("abcdef")
    response = draw(client.sampler(), prompt, max_tokens=1, include_prompt_logprobs=True, topk_prompt_logprobs=259)
    assert response.prompt_logprobs is not None
    assert response.topk_prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    assert response.topk_prompt_logprobs[0] is None
    for token, logprob, top in zip(prompt[1:], response.prompt_logprobs[1:], response.topk_prompt_logprobs[1:], strict=True):
        assert top is not None
        assert dict(top)[token] == logprob
        assert sum(np.exp(value) for _, value in top) == pytest.approx(1, abs=1e-5)
        assert [v for _, v in top] == sorted((v for _, v in top), reverse=True)


def test_only_the_last_logprobs_are_computed_when_only_they_are_asked_for(client: Client) -> None:
    import tinker

    sampler, prompt = client.sampler(), ids("a context of some length, then the completion")
    full = sampler.compute_logprobs(tinker.ModelInput.from_ints(prompt)).result(60)
    tail = sampler.compute_logprobs(tinker.ModelInput.from_ints(prompt), prompt_logprobs_last_n=10).result(60)
    assert tail[:-10] == [None] * (len(prompt) - 10)
    assert tail[-10:] == pytest.approx(full[-10:], abs=1e-5)


def test_a_stop_token_ends_the_reply_and_belongs_to_it(client: Client) -> None:
    sampler, prompt = client.sampler(), ids("stop here")
    free = tokens(draw(sampler, prompt, max_tokens=12, temperature=0.0))[0]
    at = next(i for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    response = draw(sampler, prompt, max_tokens=12, temperature=0.0, stop=[free[at]])
    assert tokens(response) == [free[: at + 1]]
    assert response.sequences[0].stop_reason == "stop"
    assert draw(sampler, prompt, max_tokens=2, stop=[]).sequences[0].stop_reason == "length"


def test_a_stop_string_ends_the_reply_at_the_token_that_completes_it(client: Client) -> None:
    import tinker

    training = client.train(rank=8)
    for _ in range(30):
        training.forward_backward([datum("Q: one, two, three, four")], "cross_entropy")
        training.optim_step(tinker.AdamParams(learning_rate=1e-2, eps=1e-8)).result(60)
    sampler = client.sampler(training.save_weights_for_sampler("counts").result(60).path)
    response = draw(sampler, ids("Q: one"), max_tokens=18, temperature=0.0, stop=["two,", "never"])
    assert tokens(response) == [ids(", two,")]
    assert response.sequences[0].stop_reason == "stop"


def test_a_prompt_may_fill_the_context_and_not_more(client: Client) -> None:
    import tinker

    sampler = client.sampler()
    assert len(tokens(draw(sampler, [5] * 500))[0]) == 12  # 512 in all, when max_tokens is not given
    assert len(sampler.compute_logprobs(tinker.ModelInput.from_ints([5] * 512)).result(60)) == 512
    with pytest.raises(tinker.BadRequestError, match="The prompt has 513 tokens; the model takes 512"):
        draw(sampler, [5] * 513, max_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "The prompt is empty"),
        ([1, 259], {}, "id outside 0…258"),
        ([1], {"max_tokens": 0}, "max_tokens must be 1 or more"),
        ([1], {"temperature": -1.0}, "sampling_params.temperature"),
        ([1], {"top_p": 0.0}, "sampling_params.top_p"),
    ],
)
def test_an_impossible_request_is_refused_with_its_field(
    client: Client, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    import tinker

    with pytest.raises(tinker.BadRequestError, match=message):
        draw(client.sampler(), prompt, **{"max_tokens": 1, **params})


def test_a_deleted_checkpoint_can_not_be_sampled_from(engine: RunningEngine, client: Client, trained: Any) -> None:
    import tinker

    gone = trained.save_weights_for_sampler("gone").result(60).path
    sampler = client.sampler(gone)
    engine.rest().delete_checkpoint_from_tinker_path(gone).result(60)
    with pytest.raises(tinker.NotFoundError, match="There is no checkpoint"):
        client.sampler(gone)
    assert len(tokens(draw(sampler, [5], max_tokens=3))[0]) == 3  # who holds the weights goes on
