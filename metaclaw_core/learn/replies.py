"""What sampled tokens say, outside the policy server.

Design: the policy server's own reader over tokens that were sampled for training, with nobody to send events to. Imported with the
tokenizer only, since both come with transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaclaw_core.policy.parse import ReplyReader


class Readers:
    """How replies of one tokenizer are read. Not for two threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        from metaclaw_core.policy.families import family_of, stops_of

        self._tokenizer, self._family = tokenizer, family_of(tokenizer)
        self.stop_ids = stops_of(self._family, tokenizer)

    def finished(self, tokens: Sequence[int], *, stops: Sequence[str] = (), calls: bool = True, thinking: bool = False) -> ReplyReader:
        """The reader of a whole reply. `calls`: any tool may be called; else marks of calls are text. `stops` and `thinking`: as
        for `ReplyReader`."""
        from metaclaw_core.policy.parse import ReplyReader

        reader = ReplyReader(
            self._tokenizer, self._family, stop_ids=self.stop_ids, stops=stops, schemas={} if calls else None, thinking=thinking,
            call_id=lambda _: None,
        )  # fmt: skip
        reader.feed(tokens)
        reader.finish()
        return reader
