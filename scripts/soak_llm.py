"""The LLM behind a soak, in a process of its own: it answers by what the request's query asks for, and notes every id it saw.

    python scripts/soak_llm.py LOG        prints its port; ends with its stdin

``?id=…&kind=…``: ok; slow (2 s); stuck (60 s); cut (the stream ends in the middle); e500, e429. A request without an id is the
worker's own and meets a judge that is mostly quick, sometimes fails, hangs or talks nonsense.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def main() -> None:
    judge = random.Random(5)
    with Path(sys.argv[1]).open("a", buffering=1) as log:

        def answer(received: Received) -> Script:
            query = parse_qs(urlsplit(received.path).query)
            if len(llm.received) > 200:
                del llm.received[:150]  # an hour of bodies would not fit into memory
            if "id" not in query:
                what = judge.random()
                if what < 0.05:
                    return Script(status=500)
                return Script(text="Nothing to say." if what < 0.1 else "Good.\nScore: 1", first_after=5.0 if what > 0.97 else 0.02)
            log.write(f"{query['id'][0]}\n")
            return KINDS[query["kind"][0]]

        with ScriptedLLM(answer) as llm:
            print(llm.port, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
