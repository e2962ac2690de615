"""A tiny model that does what it was taught however long the prompt: a tool call, and after its result an answer.

Its weights see two things only: the last token, and whether the result of a tool stands anywhere before it. Both are exact
at any length, so cross-entropy on short texts (through the SDK, on the last layer) holds for prompts of 13,000 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2e_tools import ROOT
from mitmproxy import http
from mitmproxy.io import FlowReader
from render_help import MARKS, QWEN

if TYPE_CHECKING:
    import tinker

RESULT = ("<tool_response>", "</tool_response>")
CONTEXT = 32_768
VOCABULARY = 8000
HIDDEN = 64


@dataclass(frozen=True)
class Lesson:
    """What to say: a call in pieces that are one token each and differ, and the answer once there is a result."""

    call: tuple[str, ...]
    answer: str

    @property
    def reply(self) -> str:
        return "<tool_call>" + "".join(self.call) + "</tool_call>"


READ = Lesson(('\n{"name": "', "read", '", "arguments": {"path": "', "notes.txt", '"}}\n'), " The file says milk.")
CODE = Lesson(('\n{"name": "', "exec", '", "arguments": {"code": "', r"text(await read({path:\"notes.txt\"}))", '"}}\n'), " It says milk.")
LESSONS = (READ, CODE)


def texts() -> Iterator[str]:
    """English for the vocabulary: our skills and README. What the captures say is scrambled, but not their tools' form."""
    for path in (ROOT / "README.md", *sorted((ROOT / "skills").glob("*/SKILL.md"))):
        yield path.read_text(encoding="utf-8")
    with (ROOT / "tests/captures/openai-completions.mitm").open("rb") as file:
        for flow in FlowReader(file).stream():
            if isinstance(flow, http.HTTPFlow) and (tools := json.loads(flow.request.content or b"{}").get("tools")):
                yield json.dumps(tools)


def make_untaught(folder: Path) -> Path:
    """The base model: a vocabulary of about 8,000, a context of 32,768."""
    import torch
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from metaclaw_core.engine.testing import make_model

    make_model(
        folder, layers=1, hidden=HIDDEN, intermediate=16, heads=1, kv_heads=1, context=CONTEXT,
        vocab_size=VOCABULARY, texts=texts(), stops=True, template=QWEN,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = dict.fromkeys(piece for lesson in LESSONS for piece in lesson.call)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*MARKS, *RESULT, *pieces)])
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(1)
    layer, (close,) = model.model.layers[0], tokenizer.encode(RESULT[1], add_special_tokens=False)
    attention = layer.self_attn
    with torch.no_grad():
        for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.o_proj.weight):
            weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        words = model.model.embed_tokens.weight
        words.copy_(torch.randn(words.shape))
        words[:, 0], words[:, 1:3] = 4.0, 0.0  # a constant; "this ends a result"; "a result was seen"
        words[close, 1] = 8.0
        # Its one head looks for the end of a result, wherever that is (frequencies that hardly turn), and says if there is one.
        attention.q_proj.weight[31, 0] = 1.0
        attention.k_proj.weight[31, 1] = 10.0
        attention.k_proj.weight[30, 0] = 1.0
        attention.q_norm.weight.fill_(2.0)
        attention.k_norm.weight.fill_(2.0)
        attention.v_proj.weight[0, 1] = 1.0
        attention.o_proj.weight[2, 0] = 1.0
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e12}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(service: tinker.ServiceClient, model: str, tokenizer: Any, lesson: Lesson, *, steps: int = 80) -> str:
    """Cross-entropy until it is sure; the path to sample from."""
    from tinker import types

    client = service.create_lora_training_client(model, rank=32, seed=1, train_mlp=False, train_attn=False).result(60)
    data = [_datum(tokenizer, lesson, question, asked=asked) for question in ("Read the notes.", "What is there? Look.") for asked in (True, False)]
    for _ in range(steps):
        client.forward_backward(data, "cross_entropy").result(60)
        client.optim_step(types.AdamParams(learning_rate=0.1)).result(60)
    out = client.forward(data, "cross_entropy").result(60)
    total = sum(float((-output["logprobs"].to_numpy() * datum.loss_fn_inputs["weights"].to_numpy()).sum()) for output, datum in zip(out.loss_fn_outputs, data, strict=True))
    assert total < 0.01, f"it has not learnt: {total}"
    return str(client.save_weights_for_sampler("taught").result(60).path)


def _datum(tokenizer: Any, lesson: Lesson, question: str, *, asked: bool) -> tinker.Datum:
    import numpy as np
    from tinker import types

    user = {"role": "user", "content": question}
    head = "<|im_start|>system\nYou are an assistant.<|im_end|>\n" + f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
    if asked:
        prompt, reply = head, lesson.reply
    else:
        result = "<|im_start|>user\n<tool_response>\nmilk\n</tool_response><|im_end|>\n"
        prompt, reply = head + lesson.reply + "<|im_end|>\n" + result + "<|im_start|>assistant\n", lesson.answer
    before: Sequence[int] = tokenizer.encode(prompt, add_special_tokens=False)
    said: list[int] = tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False)
    contexts = [before[-1], *said[:-1]]
    assert len(set(contexts)) == len(contexts), f"what follows a token must be one thing: {tokenizer.convert_ids_to_tokens(said)}"
    full = [*before, *said]
    weights = np.zeros(len(full) - 1, dtype=np.float32)
    weights[len(before) - 1 :] = 1.0
    targets = np.asarray(full[1:], dtype=np.int64)
    return types.Datum(model_input=types.ModelInput.from_ints(full[:-1]), loss_fn_inputs={"target_tokens": targets, "weights": weights})
