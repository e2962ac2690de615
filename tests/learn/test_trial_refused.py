"""The trial of new weights where the server refuses what was once logged. Nothing is sampled for real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tinker")
pytest.importorskip("transformers")

from training_help import put

from metaclaw_core.learn.fastchecks import Bounds, Checked
from metaclaw_core.learn.journal import Version
from metaclaw_core.learn.trainer import Sampled, ServerError
from metaclaw_core.learn.trial import trial
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store

NEW, STABLE = Version(2, "m", 1, "s", "new", None, "candidate"), Version(1, "m", None, None, "stable", None, "stable")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.db") as store:
        yield store


class Server:
    """Takes `context` tokens, prompt and reply, and refuses the weights at `broken`."""

    base_model = "m"

    def __init__(self, context: int, broken: str | None = None) -> None:
        self.context, self.broken = context, broken

    async def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1, "a": 2}, "?"))
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="?")

    async def sample(self, path: str | None, prompt: Sequence[int], *, n: int, max_tokens: int, stop_ids: Sequence[int]) -> list[Sampled]:
        if len(prompt) + max_tokens > self.context or path == self.broken:
            raise ServerError("refused", "no")
        return [Sampled((2, 1), np.full(2, -1.0, np.float32), True)]

    async def logprobs(self, path: str | None, ids: Sequence[int], last: int) -> Any:
        return np.full(last, -1.0, np.float32)


def log(store: Store, n: int, length: int, max_tokens: int = 300) -> None:
    put(store, n, [2] * length, (2, 1), (-1.0, -1.0), sampling={"temperature": 1.0, "max_tokens": max_tokens})


async def tried(store: Store, server: Server) -> Checked:
    return await trial(store, server, NEW, STABLE, Bounds())  # type: ignore[arg-type] - no real server


async def test_a_logged_prompt_that_is_too_long_by_now_says_nothing(opened: Store) -> None:
    log(opened, 0, 10)
    log(opened, 1, 500)
    found = await tried(opened, Server(200))
    assert (found.ok, found.prompts) == (True, 1)


async def test_where_the_server_refuses_all_that_was_logged_weights_wait_for_what_comes_and_never_serve_unseen(opened: Store) -> None:
    log(opened, 0, 500)
    log(opened, 1, 600)
    with pytest.raises(ServerError, match=r"New weights wait for prompts to be tried with: the server refuses the last 2\. no"):
        await tried(opened, Server(200))
    log(opened, 2, 10)
    assert (await tried(opened, Server(200))).prompts == 1


async def test_a_reply_is_given_no_more_room_than_the_logged_one_had(opened: Store) -> None:
    log(opened, 0, 190, max_tokens=10)
    assert (await tried(opened, Server(200))).prompts == 1


async def test_weights_that_are_refused_where_the_stable_ones_answer_are_broken(opened: Store) -> None:
    log(opened, 0, 10)
    found = await tried(opened, Server(200, broken="new"))
    assert (found.ok, found.reason) == (False, "nothing can be sampled from them: no")
