"""A tiny model that does what it was taught however long the prompt: a tool call, and after its result an answer.

Its weights see two things only: the last token, and whether the result of a tool stands anywhere before it. Both are exact
at any length, so cross-entropy on short texts (through the SDK, on the last layer) holds for prompts of 20,000 tokens.

Where a lesson has several ways to go on, each is as likely as the others, so logprobs are not all nearly 0. Some ways spell a
word letter by letter: ids that no tokenizer makes of their text, which only reuse can bring back into a later prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2e_tools import ROOT
from mitmproxy import http
from mitmproxy.io import FlowReader
from openclaw_tools import SCRIPTS
from render_help import MARKS, QWEN

if TYPE_CHECKING:
    import tinker

RESULT = ("<tool_response>", "</tool_response>")
CONTEXT = 32_768
VOCABULARY = 8000
HIDDEN = 64

type Way = tuple[str, ...]  # texts that are one token each
type Saying = tuple[tuple[Way, ...], ...]  # the ways to go on, one after the other


def one(*texts: str) -> tuple[Way, ...]:
    """One token, any of these."""
    return tuple((text,) for text in texts)


def spelled(word: str) -> tuple[Way, ...]:
    """As one token or letter by letter."""
    return ((word,), tuple(word))


@dataclass(frozen=True)
class Lesson:
    """What to say: a call, and an answer once there is a result. What follows a token is the same wherever it stands."""

    tool: str
    call: Saying
    answer: Saying

    @property
    def answers(self) -> set[str]:
        return {"".join(texts).strip() for texts in _sayings(self.answer)}


def _sayings(saying: Saying) -> list[list[str]]:
    return [[text for way in ways for text in way] for ways in product(*saying)]


_ANSWER = (one(" The", " Your"), one(" file", " list"), one(" says"), ((" ", "milk"), (" ", *"milk")), one("."))
READ = Lesson(
    "read",
    (one(MARKS[0]), one('\n{"name": "'), spelled("read"), one('", "arguments": {"path": "'), one("notes.txt", "./notes.txt"), one('"}}\n'), one(MARKS[1])),
    _ANSWER,
)
CODE = Lesson(
    "exec",
    (one(MARKS[0]), one('\n{"name": "'), one("exec"), one('", "arguments": {"code": "'), one(r"text(await read({path:\"notes.txt\"}))"), one('"}}\n'), one(MARKS[1])),
    _ANSWER,
)
LESSONS = (READ, CODE)


def texts() -> Iterator[str]:
    """English for the vocabulary: our skills and README, and what OpenClaw sends, which then has 16,000 to 20,000 tokens. Our
    own copies of the captures hold its tools as they are, but scrambled prose: with them it has 22,000 and more."""
    for path in (ROOT / "README.md", *sorted((ROOT / "skills").glob("*/SKILL.md"))):
        yield path.read_text(encoding="utf-8")
    full = SCRIPTS.parent / "captures"
    captures = full if full.is_dir() else ROOT / "tests/captures"
    with (captures / "openai-completions.mitm").open("rb") as file:
        for flow in FlowReader(file).stream():
            body = json.loads((isinstance(flow, http.HTTPFlow) and flow.request.content) or b"{}")
            if body.get("tools"):
                yield json.dumps(body["tools"])
                yield from (m["content"] for m in body["messages"] if isinstance(m["content"], str))


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
    sayings = [saying for lesson in LESSONS for saying in (lesson.call, lesson.answer)]
    pieces = dict.fromkeys(text for saying in sayings for ways in saying for way in ways for text in way if len(text) > 1)
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
    data = [_datum(tokenizer, lesson, texts, asked=True) for texts in _sayings(lesson.call)]
    data += [_datum(tokenizer, lesson, texts, asked=False) for texts in _sayings(lesson.answer)]
    for step in range(steps):
        client.forward_backward(data, "cross_entropy").result(60)
        client.optim_step(types.AdamParams(learning_rate=0.1 * (1 - step / steps))).result(60)
    out = client.forward(data, "cross_entropy").result(60)
    total = sum(float((-output["logprobs"].to_numpy() * datum.loss_fn_inputs["weights"].to_numpy()).sum()) for output, datum in zip(out.loss_fn_outputs, data, strict=True))
    least = sum(len(all) * math.log(len(all)) for all in map(_sayings, (lesson.call, lesson.answer)))
    assert total - least < 0.02 * len(data), f"it has not learnt: {total}, at best {least}"
    return str(client.save_weights_for_sampler("taught").result(60).path)


def _datum(tokenizer: Any, lesson: Lesson, texts: Sequence[str], *, asked: bool) -> tinker.Datum:
    """`asked`: by a human, so the tool is to be called; else its result is there."""
    import numpy as np
    from tinker import types

    prompt = "<|im_start|>user\nRead the notes.<|im_end|>\n<|im_start|>assistant\n"
    if not asked:
        call = "".join(_sayings(lesson.call)[0])
        prompt += call + "<|im_end|>\n<|im_start|>user\n<tool_response>\nmilk\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    before: Sequence[int] = tokenizer.encode(prompt, add_special_tokens=False)
    said = [_id(tokenizer, text) for text in (*texts, "<|im_end|>")]
    full = [*before, *said]
    weights = np.zeros(len(full) - 1, dtype=np.float32)
    weights[len(before) - 1 :] = 1.0
    targets = np.asarray(full[1:], dtype=np.int64)
    return types.Datum(model_input=types.ModelInput.from_ints(full[:-1]), loss_fn_inputs={"target_tokens": targets, "weights": weights})


def _id(tokenizer: Any, text: str) -> int:
    (found,) = tokenizer.encode(text, add_special_tokens=False)
    return int(found)
