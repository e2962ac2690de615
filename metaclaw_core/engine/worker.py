"""The one thread that does arithmetic.

Design: a queue of calls (training, loading, saving), run in the order they came, and the running samples. After each
call every batch of samples gets some steps before the next call, so neither starves the other; with no calls waiting
the samples run freely. One thread, because the base model's adapter in use is a property of the model; the work
inside a step is parallel anyway. Nothing here blocks the event loop: callers get their answer through a callback.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from metaclaw_core.engine.errors import OutOfMemoryError
from metaclaw_core.engine.kv import PrefixStore
from metaclaw_core.engine.lora import Adapter
from metaclaw_core.engine.model import BaseModel, is_out_of_memory
from metaclaw_core.engine.sampling import Batch, Sampled, SampleRequest

STEPS_PER_CALL = 16
MOST_ROWS = 64  # sequences decoded together; a single request may have more

type Answer[T] = Callable[[T | Exception], None]


@dataclass(frozen=True, eq=False)
class _Waiting:
    adapter: Adapter | None
    request: SampleRequest
    answer: Answer[Sampled]


class Worker:
    def __init__(self, base: BaseModel, prefix_bytes: int) -> None:
        self._base = base
        self._prefixes = PrefixStore(prefix_bytes)
        self._calls: deque[Callable[[], None]] = deque()
        self._samples: deque[_Waiting] = deque()
        self._batches: dict[int, Batch] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="metaclaw-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the call or step in hand, then end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def call[T](self, work: Callable[[], T], answer: Answer[T]) -> None:
        """Run `work` after what was asked before; `answer` gets its value or what it raised."""

        def run() -> None:
            try:
                value: T | Exception = work()
            except Exception as e:  # noqa: BLE001 - handed to whoever asked
                value = e
            answer(value)

        with self._wake:
            self._calls.append(run)
            self._wake.notify()

    def sample(self, adapter: Adapter | None, request: SampleRequest, answer: Answer[Sampled]) -> None:
        with self._wake:
            self._samples.append(_Waiting(adapter, request, answer))
            self._wake.notify()

    def cancel(self, answer: Answer[Sampled]) -> None:
        """Stop sampling for an answer nobody waits for; it is not called afterwards unless it just was."""

        def drop() -> None:
            with self._wake:
                self._samples = deque(waiting for waiting in self._samples if waiting.answer is not answer)
            for batch in self._batches.values():
                batch.drop(answer)

        self.call(drop, lambda _: None)

    def forget(self, adapter: Adapter) -> None:
        """The weights are gone: so is what was computed with them."""
        self.call(lambda: self._prefixes.forget(adapter.serial), lambda _: None)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._calls or self._samples or self._batches)
                if self._stopping:
                    return
                call = self._calls.popleft() if self._calls else None
            if call:
                call()
            for _ in range(STEPS_PER_CALL):
                self._admit()
                if not self._batches:
                    break
                self._step()

    def _admit(self) -> None:
        """Start waiting requests: all when nothing runs, else one a step, so that running ones go on."""
        idle = not self._batches
        while True:
            rows = sum(map(len, self._batches.values()))
            with self._wake:
                if not self._samples or (rows and rows + self._samples[0].request.samples > MOST_ROWS):
                    return
                waiting = self._samples.popleft()
            self._start(waiting)
            if not idle:
                return

    def _start(self, waiting: _Waiting) -> None:
        key = waiting.adapter.serial if waiting.adapter else -1
        for last in (False, True):
            batch = self._batches.get(key) or Batch(self._base, waiting.adapter, self._prefixes)
            try:
                batch.add(waiting.request, waiting.answer)
            except Exception as e:  # noqa: BLE001 - handed to whoever asked
                failure = self._explain(e)
                if isinstance(failure, OutOfMemoryError) and not last:
                    continue  # the prefixes are dropped now: once more
                waiting.answer(failure)
            if len(batch):
                self._batches[key] = batch
            return

    def _step(self) -> None:
        for key, batch in list(self._batches.items()):
            try:
                batch.step()
            except Exception as e:  # noqa: BLE001 - handed to whoever asked
                failure = self._explain(e)
                for answer in batch.fail():
                    answer(failure)
            if not len(batch):
                del self._batches[key]

    def _explain(self, error: Exception) -> Exception:
        if not is_out_of_memory(error):
            return error
        self._prefixes.clear()
        self._base.empty_cache()
        explained = OutOfMemoryError(f"The memory of {self._base.device} is not enough for this prompt or so many samples.")
        explained.__cause__ = error
        return explained
