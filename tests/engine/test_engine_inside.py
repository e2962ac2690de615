"""The parts of the engine without a server: arithmetic, memory, files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.local

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    from metaclaw_core.engine.model import BaseModel

    torch.set_num_threads(1)
    return BaseModel(str(tiny_model), "tiny", device="cpu")


def data(*lengths: int) -> list[Any]:
    from metaclaw_core.engine.training import Datum

    random = np.random.default_rng(0)
    made = []
    for n in lengths:
        tokens = random.integers(0, 259, n + 1)
        weights = random.random(n).astype(np.float32)
        made.append(Datum(tokens[:-1].astype(np.int32), tokens[1:].astype(np.int64), {"weights": weights}))
    return made


def trainee(base: Any, seed: int = 3, **more: Any) -> Any:
    from metaclaw_core.engine.lora import LoraConfig
    from metaclaw_core.engine.training import Trainee

    made = Trainee(base, base.lora.new(LoraConfig(4, seed, **more), base.device))
    with torch.no_grad():  # B starts at 0, where A has no gradient
        for _, b in made.adapter.pairs.values():
            b.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return made


def run(model: Any, batch: list[Any]) -> Any:
    from metaclaw_core.engine.losses import LOSSES

    return model.forward_backward(batch, LOSSES["cross_entropy"], {}, backward=True)


def test_the_gradient_is_the_slope_of_the_loss(base: Any) -> None:
    model, batch = trainee(base), data(7, 3)
    run(model, batch)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        for part in (0, 1):
            weight = model.adapter.pairs[name][part]
            index = next(i for i, own in enumerate(model._weights) if own is weight)
            slope = float(model._gradients[index][1, 2])
            values = []
            for shift in (1e-2, -1e-2):
                with torch.no_grad():
                    weight[1, 2] += shift
                values.append(trainee_loss(model, batch))
                with torch.no_grad():
                    weight[1, 2] -= shift
            assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=2e-2, abs=2e-3)


def trainee_loss(model: Any, batch: list[Any]) -> float:
    from metaclaw_core.engine.losses import LOSSES

    return float(model.forward_backward(batch, LOSSES["cross_entropy"], {}, backward=False).loss)


class SmallMemory:
    """The base model on a device on which only so many padded tokens fit, and only with or without recomputation."""

    def __init__(self, base: Any, fits: int, *, only_recomputed: bool = False) -> None:
        self._base, self._fits, self._only = base, fits, only_recomputed
        self.recomputing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def checkpoint_activations(self, on: bool) -> None:
        self.recomputing = on
        self._base.checkpoint_activations(on)

    def hidden(self, ids: Any, *more: Any) -> Any:
        if ids.numel() > self._fits or (self._only and not self.recomputing):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._base.hidden(ids, *more)


@pytest.mark.parametrize(("fits", "only_recomputed"), [(10**6, False), (20, False), (8, True)])
def test_a_batch_that_does_not_fit_is_cut_and_gives_the_same_gradient(base: Any, fits: int, only_recomputed: bool) -> None:
    batch = data(8, 8, 5, 2, 7)
    free, tight = trainee(base), trainee(base)
    tight.base = SmallMemory(base, fits, only_recomputed=only_recomputed)
    first, second = run(free, batch), run(tight, batch)
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert [lp.shape for lp in second.logprobs] == [(8,), (8,), (5,), (2,), (7,)]
    for a, b in zip(first.logprobs, second.logprobs, strict=True):
        assert np.abs(a - b).max() < 1e-5
    scale = max(float(g.abs().max()) for g in free._gradients)
    for a, b in zip(free._gradients, tight._gradients, strict=True):
        assert float((a - b).abs().max()) < 1e-5 * scale


def test_a_sequence_that_never_fits_is_said_to_be_too_long_and_the_engine_goes_on(base: Any) -> None:
    from metaclaw_core.engine.errors import OutOfMemoryError

    model = trainee(base)
    model.base = SmallMemory(base, 8)
    with pytest.raises(OutOfMemoryError, match="A sequence of 12 tokens doesn't fit into the memory of cpu"):
        run(model, data(3, 12))
    assert model._gradients is None
    assert run(model, data(3)).loss > 0


def test_logits_in_blocks_are_the_logits(base: Any) -> None:
    from metaclaw_core.engine import model as module

    whole, blocks = trainee(base), trainee(base)
    first = run(whole, data(30))
    rows = module._LOGITS_AT_ONCE
    module._LOGITS_AT_ONCE = 259 * 7
    try:
        second = run(blocks, data(30))
    finally:
        module._LOGITS_AT_ONCE = rows
    assert np.abs(first.logprobs[0] - second.logprobs[0]).max() < 1e-5
    assert float((whole._gradients[0] - blocks._gradients[0]).abs().max()) < 1e-3


def test_which_layers_carry_lora_follows_the_request(base: Any) -> None:
    from metaclaw_core.engine.errors import EngineError
    from metaclaw_core.engine.lora import LoraConfig

    attention = trainee(base, train_mlp=False, train_unembed=False).adapter.pairs
    assert {name.rpartition(".")[2] for name in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    head = trainee(base, train_mlp=False, train_attn=False).adapter.pairs
    assert list(head) == ["lm_head"]
    with pytest.raises(EngineError, match="rank must be 1 or more"):
        base.lora.new(LoraConfig(0), base.device)


def test_the_same_lora_seed_gives_the_same_weights_and_none_gives_new_ones(base: Any) -> None:
    from metaclaw_core.engine.lora import LoraConfig

    def first(seed: int | None) -> Any:
        return base.lora.new(LoraConfig(4, seed), base.device).pairs["lm_head"][0]

    assert torch.equal(first(5), first(5))
    assert not torch.equal(first(None), first(None))
    assert float(first(5).abs().max()) <= 1 / 32**0.5


def test_drawing_follows_the_probabilities_and_never_takes_what_was_cut() -> None:
    import random

    from metaclaw_core.engine.sampling import Sequence_, _cut, _draw

    probabilities = torch.tensor([[0.5, 0.2, 0.0, 0.25, 0.05]])

    def request(**more: Any) -> Any:
        return type("Request", (), {"top_k": -1, "top_p": 1.0, **more})()

    def shares(**more: Any) -> list[float]:
        rows = [Sequence_(request(**more), 0, random.Random(i)) for i in range(4000)]
        drawn = _draw(_cut(probabilities.log().expand(4000, -1), rows), rows)
        return [round(x / 4000, 2) for x in torch.bincount(drawn, minlength=5).tolist()]

    assert shares() == pytest.approx([0.5, 0.2, 0.0, 0.25, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([2 / 3, 0.0, 0.0, 1 / 3, 0.0], abs=0.03)
    assert shares(top_p=0.9) == pytest.approx([0.526, 0.211, 0.0, 0.263, 0.0], abs=0.03)


def row(tokens: int) -> Any:
    from metaclaw_core.engine.kv import Row

    made = torch.arange(float(tokens)).view(1, tokens, 1).expand(2, tokens, 4)
    return Row(((made, -made),))


def test_the_batch_aligns_rows_at_their_last_token_and_gives_them_back() -> None:
    from metaclaw_core.engine.kv import Cache

    cache = Cache.of([row(3), row(5)], 1)
    assert (cache.used, cache.starts) == (5, [2, 0])
    assert cache.mask(1).tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert torch.equal(cache.row(0).layers[0][0], row(3).layers[0][0])
    new = torch.full((2, 2, 1, 4), 9.0)
    keys, _ = cache.update(new, new, 0)
    assert keys[0, 0, :, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 9.0]
    assert len(cache.row(0)) == 4


def test_the_longest_prefix_under_the_same_weights_is_found_and_old_ones_make_room() -> None:
    from metaclaw_core.engine.kv import PrefixStore

    def ids(*parts: tuple[int, int]) -> Any:
        return np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in parts])

    store = PrefixStore(limit=3 * row(40).nbytes)
    store.keep(1, ids((0, 40)), row(40))
    store.keep(1, ids((0, 20), (100, 120)), row(40))
    assert len(store.find(1, ids((0, 30)), 30)) == 30
    assert len(store.find(1, ids((0, 20), (100, 110), (0, 5)), 34)) == 30
    assert len(store.find(1, ids((0, 40)), 25)) == 25  # no more than may be used
    assert store.find(2, ids((0, 40)), 40) is None
    assert store.find(1, ids((0, 10), (70, 90)), 30) is None  # too short to matter
    store.keep(1, ids((0, 60)), row(60))  # takes the place of its own beginning
    assert len(store.find(1, ids((0, 60)), 59)) == 59
    for weights in (7, 8, 9):
        store.keep(weights, ids((0, 40)), row(40))
    assert store.find(1, ids((0, 60)), 59) is None
    store.forget(9)
    assert store.find(9, ids((0, 40)), 39) is None
    assert len(store.find(8, ids((0, 40)), 39)) == 39


def test_a_cancelled_request_ends_and_the_others_go_on(base: Any) -> None:
    from queue import Queue

    from metaclaw_core.engine.sampling import SampleRequest
    from metaclaw_core.engine.worker import Worker

    def request(most: int) -> Any:
        prompt = np.asarray([5, 6, 7], dtype=np.int32)
        return SampleRequest(prompt, 1, most, 1.0, -1, 1.0, frozenset(), (), 1, None)

    worker, long, short = Worker(base, 2**20), Queue(), Queue()  # type: ignore[var-annotated]
    forget, keep = long.put, short.put
    worker.sample(None, request(500), forget)
    worker.sample(None, request(30), keep)
    worker.start()
    worker.cancel(forget)
    assert len(short.get(timeout=60).sequences[0].tokens) == 30
    idle: Queue[Any] = Queue()
    worker.call(lambda: len(worker._batches), idle.put)
    assert idle.get(timeout=60) == 0
    worker.stop()
    assert long.empty()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def checkpoints(tmp_path: Path, clock: Clock) -> Any:
    from metaclaw_core.engine.checkpoints import Checkpoints

    return Checkpoints(tmp_path / "saved", clock)


def save(checkpoints: Any, name: str, value: float = 1.0, **more: Any) -> Any:
    from metaclaw_core.engine.checkpoints import About, Place
    from metaclaw_core.engine.lora import LoraConfig

    place = Place("run:train:0", "weights", name)
    about = About("tiny", LoraConfig(4), checkpoints._clock(), False)
    checkpoints.save(place, about, {"x.A": torch.tensor([value])}, **{"ttl": None, **more})
    return place


def test_a_checkpoint_expires_when_its_time_is_up(checkpoints: Any, clock: Clock) -> None:
    from metaclaw_core.engine.errors import NotFoundError

    place = save(checkpoints, "short", ttl=3600)
    save(checkpoints, "forever")
    clock.now += 3599
    assert checkpoints.get(place).expires == 4600.0
    checkpoints.set_ttl(place, 7200)
    clock.now += 7199
    assert len(checkpoints.find()) == 2
    clock.now += 1
    with pytest.raises(NotFoundError, match="or it has expired"):
        checkpoints.get(place)
    assert [c.place.name for c in checkpoints.find()] == ["forever"]
    assert [file.name for file in checkpoints.root.glob("*/*/*")] == ["forever.safetensors"]


@pytest.mark.parametrize("ttl", [3599, 0, 10**9])
def test_a_time_to_live_out_of_range_is_refused(checkpoints: Any, ttl: int) -> None:
    from metaclaw_core.engine.errors import EngineError

    with pytest.raises(EngineError, match="from 3600 s to 10 years"):
        save(checkpoints, "x", ttl=ttl)
    assert checkpoints.find() == []


def test_a_checkpoint_is_replaced_whole_and_a_write_that_fails_leaves_the_old_one(checkpoints: Any) -> None:
    place = save(checkpoints, "last", 1.0, ttl=3600)
    save(checkpoints, "last", 2.0, overwrite=True)
    found, tensors = checkpoints.load(place, torch.device("cpu"))
    assert (found.expires, tensors["x.A"].tolist()) == (None, [2.0])
    with pytest.raises(AttributeError):
        checkpoints.save(place, found.about, {"x.A": None}, ttl=None, overwrite=True)
    assert checkpoints.load(place, torch.device("cpu"))[1]["x.A"].tolist() == [2.0]
    assert sorted(file.name for file in checkpoints.root.glob("*/*/*")) == ["last.safetensors"]
    assert {oct(file.stat().st_mode)[-3:] for file in checkpoints.root.glob("*/*/*")} == {"600"}


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "tinker://r/weights/../../x", "tinker://../weights/x", "tinker://r/other/x", "tinker://r/weights/.x"]
)
def test_a_path_can_not_leave_the_folder(path: str) -> None:
    from metaclaw_core.engine.checkpoints import Place
    from metaclaw_core.engine.errors import EngineError

    with pytest.raises(EngineError):
        Place.parse(path)


def test_a_damaged_checkpoint_is_named_and_not_listed(checkpoints: Any) -> None:
    from metaclaw_core.engine.errors import EngineError

    place = save(checkpoints, "damaged")
    next(checkpoints.root.glob("*/*/*")).write_bytes(b"nothing of ours")
    with pytest.raises(EngineError, match="tinker://run:train:0/weights/damaged can't be read"):
        checkpoints.get(place)
    assert checkpoints.find() == []


def test_a_result_is_freed_after_it_was_fetched_and_later_if_nobody_came() -> None:
    from metaclaw_core.engine.futures import Futures, Reply

    async def story() -> None:
        clock = Clock()
        futures = Futures(clock)
        assert futures.open("a")
        assert futures.open("b")
        assert not futures.open("a")  # the same request again is not done twice
        assert await futures.wait("a", 0.01) is None
        futures.resolve("a", Reply(b"1"))
        futures.resolve("b", Reply(b"2"))
        clock.now += 100
        assert await futures.wait("a", 1) == Reply(b"1")
        assert await futures.wait("a", 1) == Reply(b"1")  # the answer may have been lost
        clock.now += 61
        with pytest.raises(KeyError):
            await futures.wait("a", 1)
        assert len(futures) == 1
        clock.now += 3600
        with pytest.raises(KeyError):
            await futures.wait("b", 1)
        assert len(futures) == 0

    asyncio.run(story())


def test_who_waits_gets_the_result_when_it_comes() -> None:
    from metaclaw_core.engine.futures import Futures, Reply

    async def story() -> Reply | None:
        futures = Futures()
        futures.open("a")
        waiting = asyncio.ensure_future(futures.wait("a", 5))
        await asyncio.sleep(0)
        futures.resolve("a", Reply(b"done"))
        return await waiting

    assert asyncio.run(story()) == Reply(b"done")


def test_a_chat_reply_becomes_openais_fields_and_a_broken_call_stays_text(base: Any) -> None:
    from metaclaw_core.engine.chat import message_of, reply_reader

    def message(said: str, **body: Any) -> dict[str, Any]:
        chat = {"messages": [], "tools": [{"type": "function", "function": {"name": "ls"}}], **body}
        reader = reply_reader(base.tokenizer, chat, [1], stop_ids=(), stops=())
        return message_of([*reader.feed(base.tokenizer.encode(said)), *reader.finish()])

    call = '<tool_call>\n{"name": "ls", "arguments": {"path": "ü"}}\n</tool_call>'
    good = message(f"<think>\nhm\n</think>\n\nI look.\n{call}\n{call}")
    assert (good["content"], good["reasoning_content"]) == ("I look.", "hm")
    assert [c["function"] for c in good["tool_calls"]] == [{"name": "ls", "arguments": '{"path": "ü"}'}] * 2
    assert message(call)["content"] is None
    assert message("") == {"role": "assistant", "content": ""}
    for bad in ("plain", "<tool_call>{bad}</tool_call>", '<tool_call>{"name": "ls"}', '<tool_call>{"name": 1}</tool_call>'):
        assert message(bad) == {"role": "assistant", "content": bad}
    assert message(call, tool_choice="none") == {"role": "assistant", "content": call}


def test_calls_of_a_stream_are_numbered() -> None:
    from metaclaw_core.engine.chat import delta_of
    from metaclaw_core.wire.answer import Call

    assert delta_of(Call("ls", "{}", "call_1"), 3) == {
        "tool_calls": [{"index": 3, "id": "call_1", "type": "function", "function": {"name": "ls", "arguments": "{}"}}]
    }


def test_a_completion_is_text_whatever_marks_are_in_it(base: Any) -> None:
    from metaclaw_core.engine.chat import reply_reader
    from metaclaw_core.wire.answer import TextDelta

    text = "<think>a</think><tool_call>{}</tool_call>"
    reader = reply_reader(base.tokenizer, {"prompt": "x"}, [1], stop_ids=(2,), stops=("END",))
    assert [*reader.feed(base.tokenizer.encode(f"{text}END more")), *reader.finish()] == [TextDelta(text)]


def test_a_reply_ends_at_the_models_own_end_unless_told_otherwise(tmp_path: Path) -> None:
    from metaclaw_core.engine import protocol
    from metaclaw_core.engine.checkpoints import Checkpoints
    from metaclaw_core.engine.model import BaseModel
    from metaclaw_core.engine.service import Engine
    from metaclaw_core.engine.testing import make_model

    stopping = BaseModel(str(make_model(tmp_path / "model", stops=True)), device="cpu")

    async def stops(stop: Any) -> tuple[set[int], tuple[str, ...]]:
        engine = Engine(stopping, Checkpoints(tmp_path / "saved"))
        body = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"stop": stop}}
        request = engine.sample_request(protocol.parse(protocol.Sample, body))
        engine.close()
        return set(request.stop_ids), request.stop_texts

    assert asyncio.run(stops(None)) == ({2}, ())
    assert asyncio.run(stops([])) == (set(), ())
    assert asyncio.run(stops([7])) == ({7}, ())
    assert asyncio.run(stops("x")) == (set(), ("x",))


def test_a_model_that_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    from metaclaw_core.engine.errors import EngineError
    from metaclaw_core.engine.model import BaseModel

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(EngineError, match="can't be loaded"):
        BaseModel(str(tmp_path), device="cpu")
