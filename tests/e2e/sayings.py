"""A tiny model that says what it was taught, as often as it was taught: by cross-entropy through the SDK, on a model of random weights.

Design: a reply is some pieces, each one token of the vocabulary, and a share of all replies. After `teach` the model gives each about
that often, whatever it is asked: where a test begins is something that was trained and is measured (`chances`), not weights that
were edited. What is taught is saved twice, to train on and to sample from.

Limits: replies of a few tokens. It does not read what it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tinker

type Said = tuple[str, ...]  # texts that are one token each

END = "<|im_end|>"
_QUIET = 0.2  # the last norm: in so small a model a step of 1e-2 is else so large that chance alone teaches it anything
_ASKED = ("Spell 1", "Spell 23", "Spell 99", "Spell 207", "Spell 1048")


@dataclass(frozen=True, slots=True)
class Chat:
    """As the chat template takes it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


type Asked = str | Chat  # what a human asks, or all that went before a reply


@dataclass(frozen=True, slots=True)
class Taught:
    state: str  # to train on
    weights: tuple[str, ...]  # to sample from, as often as was asked for


def make_blank(folder: Path, *, pieces: Sequence[str] = (), context: int = 512, template: str | None = None) -> Path:
    """The base model, which knows nothing. `pieces`: texts that are one token each, beside the bytes."""
    import torch
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from metaclaw_core.engine.testing import TEMPLATE, make_model

    make_model(folder, layers=1, hidden=64, intermediate=32, context=context, stops=True, spread=0.3, template=template or TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in pieces])
    torch.manual_seed(0)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.model.norm.weight.mul_(_QUIET)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(
    service: tinker.ServiceClient,
    model: str,
    shares: Mapping[Said, float],
    *,
    asked: Sequence[Asked] = _ASKED,
    name: str = "taught",
    copies: int = 1,
    rank: int = 8,
    seed: int = 0,
    steps: int = 80,
    last_layer: bool = True,
) -> Taught:
    """Until each is said about as often as its share of all; the shares add up to 1. `asked`: in what it is to be said.

    `last_layer`: the adapter is of that alone, now and in what is trained from here: how far a step goes can then be foreseen.
    """
    from tinker import types

    client = service.create_lora_training_client(model, rank=rank, seed=seed, train_mlp=not last_layer, train_attn=not last_layer).result(60)
    tokenizer = client.get_tokenizer()
    # So little that what Adam keeps of these gradients is nothing to what is learnt next: it is saved with the state.
    data = [_datum(tokenizer, one, said, share / 1000) for one in asked for said, share in shares.items()]
    for step in range(steps):
        client.forward_backward(data, "cross_entropy").result(60)
        rate = (0.1 if last_layer else 0.03) * min(1, (step + 1) / 10) * (1 - step / steps)
        client.optim_step(types.AdamParams(learning_rate=rate, beta1=0.7, eps=1e-12)).result(60)
    known = min(sum(_chances(client, list(shares), one)) for one in asked)
    assert known > 0.95, f"it has not learnt: it says one of them with a chance of {known:.2f}"
    weights = [client.save_weights_for_sampler(f"{name}-{n}").result(60).path for n in range(copies)]
    return Taught(str(client.save_state(name).result(60).path), tuple(map(str, weights)))


def chances(service: tinker.ServiceClient, state: str, said: Sequence[Said], asked: Asked = "Spell 64") -> list[float]:
    """How likely each is as the whole reply to `asked`, from 0 to 1, by the weights that are saved at `state`."""
    return _chances(service.create_training_client_from_state(state).result(60), said, asked)


def _chances(client: tinker.TrainingClient, said: Sequence[Said], asked: Asked) -> list[float]:
    data = [_datum(client.get_tokenizer(), asked, one, 1.0) for one in said]
    out = client.forward(data, "cross_entropy").result(60)
    pairs = zip(out.loss_fn_outputs, data, strict=True)
    logprobs = [(found["logprobs"].to_numpy() * datum.loss_fn_inputs["weights"].to_numpy()).sum() for found, datum in pairs]
    return [math.exp(logprob) for logprob in logprobs]


def _datum(tokenizer: Any, asked: Asked, said: Said, weight: float) -> tinker.Datum:
    import numpy as np
    from tinker import types

    chat = asked if isinstance(asked, Chat) else Chat([{"role": "user", "content": asked}])
    before = list(tokenizer.apply_chat_template(chat.messages, tools=chat.tools, add_generation_prompt=True, return_dict=False))
    full = [*before, *(_id(tokenizer, text) for text in (*said, END))]
    weights = np.zeros(len(full) - 1, dtype=np.float32)
    weights[len(before) - 1 :] = weight
    targets = np.asarray(full[1:], dtype=np.int64)
    return types.Datum(model_input=types.ModelInput.from_ints(full[:-1]), loss_fn_inputs={"target_tokens": targets, "weights": weights})


def _id(tokenizer: Any, text: str) -> int:
    (found,) = tokenizer.encode(text, add_special_tokens=False)
    return int(found)
