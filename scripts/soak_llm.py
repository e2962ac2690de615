"""The LLM behind a soak, in a process of its own: it answers by what the request's query asks for, and notes every id it saw.

    python scripts/soak_llm.py LOG        prints its port; ends with its stdin

``?id=…&kind=…``: ok; slow (2 s); stuck (60 s); cut (the stream ends in the middle); e500, e429. A request without an id is the
worker's own and meets a judge that is mostly quick, sometimes fails, hangs or talks nonsense. Else it knows the golden set, so that
training is not paused, and likes about half of the replies that it is shown.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metaclaw_core.learn.health import golden_pairs
from metaclaw_core.model import Text, ToolCall
from metaclaw_core.testing import Received, Script, ScriptedLLM

TEXT = "one two three four five six seven eight nine ten"
KINDS = {
    "ok": Script(text=TEXT, pieces=5),
    "slow": Script(text=TEXT, pieces=5, first_after=2.0),
    "stuck": Script(text=TEXT, pieces=5, first_after=60.0),
    "cut": Script(text=TEXT, pieces=8, cut_after=4),
    "e500": Script(status=500),
    "e429": Script(status=429),
}


def knowing() -> Callable[[Received], str]:
    """What a judge says that is always right on the golden set, and by chance, but always the same, on a reply."""
    pieces = [(p.instruction, [x.text if isinstance(x, Text) else x.arguments for x in p.better.parts if isinstance(x, (Text, ToolCall))]) for p in golden_pairs()]

    def says(received: Received) -> str:
        asked = str(received.json()["messages"][-1]["content"])
        first = "".join(part for part in asked.split("<<<") if " candidate A, " in part[:40])
        if first:
            better = next((parts for instruction, parts in pieces if f"human\n{instruction}\n" in asked), [])
            return f"Better: {'A' if all(part in first for part in better) else 'B'}"
        return f"Good.\nScore: {1 if crc32(received.body) % 2 else -1}"

    return says


def main() -> None:
    judge, says = random.Random(5), knowing()
    with Path(sys.argv[1]).open("a", buffering=1) as log:

        def answer(received: Received) -> Script:
            query = parse_qs(urlsplit(received.path).query)
            if len(llm.received) > 200:
                del llm.received[:150]  # an hour of bodies would not fit into memory
            if "id" not in query:
                what = judge.random()
                if what < 0.05:
                    return Script(status=500)
                return Script(text="Nothing to say." if what < 0.1 else says(received), first_after=5.0 if what > 0.97 else 0.02)
            log.write(f"{query['id'][0]}\n")
            return KINDS[query["kind"][0]]

        with ScriptedLLM(answer) as llm:
            print(llm.port, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
