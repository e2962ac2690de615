"""Make tests/captures from the recordings of the real OpenClaw: the same traffic without other people's prose.

    .venv/bin/python scripts/make_fixtures.py [FOLDER OF RECORDINGS]      (default: ../shared/captures)

A fixture has the structure, the markers, the ids, the headers and every length of its recording, so that whatever reads
a recording reads the fixture alike. What its authors wrote (system prompts, tool descriptions, notices) becomes filler:
each word is replaced by a made-up one of the same length and capitals, the same everywhere and different from that of
every other word. So equal texts stay equal, a prefix stays a prefix, and different texts stay different.

Kept as they are: JSON structure and keys, ids, names, every answer (they were scripted), what the human says (written
for the recordings), and the phrases of KEPT below, by which a client's messages are recognised. The keys in the headers
are fake and stay: tests look for them. The HAR file is one recording as mitmproxy exports it.

Limits: made for these recordings. A string is rewritten only in the places that `rewrite_body` names, and a recording
whose body is not the plain JSON that JavaScript writes is refused, not guessed at.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mitmproxy import http
from mitmproxy import io as mitmproxy_io
from mitmproxy.addons.savehar import SaveHar

ROOT = Path(__file__).resolve().parents[1]
HAR_OF = "openai-completions"

# Written for the recordings: what the scripted human and the scripted model say, wherever it is quoted.
SCRIPTED = [
    r"(?:one|two) LONG:20000",
    r"(?:lorem ipsum dolor sit amet ?)+(?:lorem)?",
    r"Summary: the user greeted the assistant and asked for a file to be read; it was read\.",
    r"Count to three and report back\.",
    r"ok: l=example/fake-1 \| default_model=example/fake-1 \| shell=bash",
    r"remember the milk",
    r"hello-from-exec",
]
# OpenClaw's own wording, as far as it tells what a message is.
MARKERS = [
    r"<!-- /?openclaw:attempt:(?:STABLE|DYNAMIC) -->",
    r"<<<(?:BEGIN|END)_OPENCLAW_INTERNAL_CONTEXT>>>",
    r"Runtime: agent=[^\n]*",
    r"\[(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) \d{4}-\d\d-\d\d \d\d:\d\d [^\]]+\] ",
    r"\[Subagent Context\] You are running as a subagent \(depth \d/\d\)",
    r"\[Subagent Task\]",
    r"A background task completed\.(?: Use this result)?",
    r"\[Inter-session message\] sourceSession=\S+ sourceChannel=\S+ sourceTool=\S+ isUser=(?:false|true)",
    r"\[Internal task completion event\]",
    r"source: subagent(?=\n)|type: subagent task|task: counter|status: completed; ready for parent review",
    r"(?m:^(?:session_key|session_id): \S+$)",
    r"Follow the heartbeat monitor scratch context when provided\.",
    r"Current time: [^\n]*\nReference UTC: [^\n]*",
    r"You are a context summarization assistant\.",
    r"The conversation history before this point was compacted into the following summary:",
    r"(?m:^\[User\]:)",
    r"NO_REPLY",
]
# Names and addresses inside prose.
NAMES = [
    r"(?m:^## (?:Tooling|Safety|Runtime Context|Skills|Memory|Workspace|Temporal Context|Silent Replies|Messaging|Runtime)$)",
    r"<(?P<tag>name|location)>[^<]*</(?P=tag)>",
    r"</?[a-z][a-z_-]*>",
    r"[A-Za-z]+(?:_[A-Za-z]+)+",
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    r"\b[0-9a-f]{16,}\b",
    r"agent:main:[\w:-]+",
    r"(?:~|/home/user)/[\w./-]*",
    r"\b[A-Z]+\.md\b",
]
KEPT = re.compile("|".join(SCRIPTED + MARKERS + NAMES))

# A user message that opens so was written by OpenClaw; every other one is the human's and stays whole, retries included.
NOT_HUMAN = re.compile(
    r"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>|Follow the heartbeat monitor|<conversation>"
    r"|The conversation history before this point|(?:\[[^\]]+\] )?(?:\[Subagent Context\]|A background task completed\.)"
)
WORD = re.compile(r"(?<!\\)[A-Za-z]+")  # the n of a literal \n belongs to the escape, not to the word after it


# ── prose to filler ─────────────────────────────────────────────────────────────────────────────────────────────────
def prose(text: str) -> Iterator[tuple[int, int]]:
    """The spans of the text that are not kept."""
    end = 0
    for kept in KEPT.finditer(text):
        yield end, kept.start()
        end = kept.end()
    yield end, len(text)


def made_up(word: str, attempt: int) -> str:
    digest = hashlib.shake_256(f"{attempt} {word}".encode()).digest(len(word))
    if attempt < 40:  # consonant, vowel, consonant, …
        return "".join(("bcdfghjklmnprstvwz", "aeiou")[i % 2][byte % (18, 5)[i % 2]] for i, byte in enumerate(digest))
    return "".join("abcdefghijklmnopqrstuvwxyz"[byte % 26] for byte in digest)


def dictionary(words: Iterable[str]) -> dict[str, str]:
    """A filler for each word, no two alike. Words of up to three letters may have the filler of some other real word."""
    real = {word.lower() for word in words}
    filler: dict[str, str] = {}
    used: set[str] = set()
    for word in sorted(real):
        attempt = 0
        while (new := made_up(word, attempt)) in used or new == word or (len(word) > 3 and new in real):
            attempt += 1
        filler[word] = new
        used.add(new)
    return filler


def like(shape: str, word: str) -> str:
    return "".join(b.upper() if a.isupper() else b for a, b in zip(shape, word, strict=True))


def rewrite_text(text: str, filler: dict[str, str]) -> str:
    out, end = [], 0
    for start, stop in prose(text):
        out.append(text[end:start])
        out.append(WORD.sub(lambda match: like(match[0], filler[match[0].lower()]), text[start:stop]))
        end = stop
    return "".join(out)


# ── where prose stands in a request ─────────────────────────────────────────────────────────────────────────────────
Change = Callable[[str], str]


def dump(body: Any) -> str:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False)


def rewrite_body(body: Any, change: Change) -> Any:
    """`change` applied to each string that others wrote, in any of the five dialects."""
    places: dict[str, Callable[[Any], Any]] = {
        "tools": lambda tools: rewrite_descriptions(tools, change),
        "instructions": change,
        "system": lambda blocks: rewrite_content(blocks, change),
        "systemInstruction": lambda content: {**content, "parts": rewrite_content(content["parts"], change)},
    }
    places |= dict.fromkeys(("messages", "input", "contents"), lambda items: [rewrite_item(i, change) for i in items])
    return {key: places.get(key, lambda same: same)(value) for key, value in body.items()}


def rewrite_descriptions(node: Any, change: Change) -> Any:
    if isinstance(node, list):
        return [rewrite_descriptions(item, change) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: change(value) if key == "description" and isinstance(value, str) else rewrite_descriptions(value, change)
        for key, value in node.items()
    }


def rewrite_item(item: dict[str, Any], change: Change) -> dict[str, Any]:
    if item.get("role") in ("assistant", "model"):
        return item

    def unless_human(text: str) -> str:
        return change(text) if NOT_HUMAN.match(text) else text

    def rewrite(content: Any) -> Any:
        if isinstance(content, list):
            return [rewrite(part) for part in content]
        is_result = isinstance(content, dict) and ("functionResponse" in content or content.get("type") == "tool_result")
        return rewrite_content(content, unless_human if item.get("role") == "user" and not is_result else change)

    return {key: rewrite(value) if key in ("content", "parts", "output") else value for key, value in item.items()}


def rewrite_content(content: Any, change: Change) -> Any:
    if isinstance(content, str):
        return rewrite_nested(content, change)
    if isinstance(content, list):
        return [rewrite_content(part, change) for part in content]
    if isinstance(content, dict):  # a block of text, or a tool's result in one of its forms
        results = ("text", "content", "output", "functionResponse", "response")
        return {key: rewrite_content(value, change) if key in results else value for key, value in content.items()}
    return content


def rewrite_nested(text: str, change: Change) -> str:
    """A tool's result may be JSON, even JSON in JSON: there keys and short values are structure, not prose."""
    try:
        value = json.loads(text)
    except ValueError:
        return change(text)
    for write in (dump, lambda value: json.dumps(value, indent=2, ensure_ascii=False)):
        if isinstance(value, (dict, list)) and write(value) == text:
            return write(rewrite_leaves(value, change))
    return change(text)


def rewrite_leaves(value: Any, change: Change) -> Any:
    if isinstance(value, dict):
        return {key: rewrite_leaves(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [rewrite_leaves(one, change) for one in value]
    if isinstance(value, str) and len(WORD.findall(value)) >= 5:
        return rewrite_nested(value, change)
    return value


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def read(path: Path) -> list[http.HTTPFlow]:
    with path.open("rb") as file:
        return [flow for flow in mitmproxy_io.FlowReader(file).stream() if isinstance(flow, http.HTTPFlow)]


def body_of(flow: http.HTTPFlow) -> Any:
    raw = flow.request.raw_content or b""
    body = json.loads(raw)
    if dump(body).encode() != raw:
        raise SystemExit(f"{flow.request.path}: the body is not written as JSON.stringify writes it")
    return body


def words_of(flows: Iterable[http.HTTPFlow]) -> set[str]:
    words: set[str] = set()

    def note(text: str) -> str:
        for start, stop in prose(text):
            words.update(word.lower() for word in WORD.findall(text[start:stop]))
        return text

    for flow in flows:
        rewrite_body(body_of(flow), note)
    return words


def main(source: Path, target: Path) -> None:
    recordings = {path.name: read(path) for path in sorted(source.glob("*.mitm"))}
    if not recordings:
        raise SystemExit(f"no recordings in {source}")
    filler = dictionary(words_of(flow for flows in recordings.values() for flow in flows))
    target.mkdir(parents=True, exist_ok=True)
    for name, flows in recordings.items():
        with (target / name).open("wb") as file:
            writer = mitmproxy_io.FlowWriter(file)
            for flow in flows:
                raw = dump(rewrite_body(body_of(flow), lambda text: rewrite_text(text, filler))).encode()
                if len(raw) != len(flow.request.raw_content or b""):
                    raise SystemExit(f"{name}: a body changed its length")
                flow.request.raw_content = raw
                writer.add(flow)
        print(f"{name}: {len(flows)} flows")
    har = json.dumps(SaveHar().make_har(recordings[f"{HAR_OF}.mitm"]), indent=1)
    (target / f"{HAR_OF}.har").write_text(har + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "captures", ROOT / "tests" / "captures")
