"""The embedding mode against a real HTTP server on loopback and a real child process; only the model is scripted.

The scripted model has three dimensions: gardening, programming, anything else.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from metaclaw_core.errors import ConfigError
from metaclaw_core.skills import Index, Skill, build_index
from metaclaw_core.skills.embedding import (
    Embedding,
    EmbeddingError,
    HttpEmbedder,
    ProcessEmbedder,
    create_embedder,
    embed_index,
    nearness,
    unit_rows,
)
from metaclaw_core.skills.retrieve import Options

_SKILLS = [
    Skill("roses", "Prune roses in March."),
    Skill("tomatoes", "Sow tomatoes."),
    Skill("python", "Write Python code."),
    Skill("weather", "Tell the forecast."),
]


def meaning(text: str) -> list[float]:
    garden = sum(word in text.lower() for word in ("rose", "tomato", "rosen", "schneiden", "sow"))
    code = sum(word in text.lower() for word in ("python", "code", "programm"))
    return [garden, code, 0.3]


class Endpoint:
    """An OpenAI-compatible /v1/embeddings that also does what the test asks for."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.delay = 0.0
        self.status = 200
        self.answer: Any = None  # instead of vectors
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.requests.append({"path": self.path, **body})
                endpoint.keys.append(self.headers["authorization"])
                time.sleep(endpoint.delay)
                rows = [{"index": i, "embedding": meaning(text)} for i, text in enumerate(body["input"])]
                out = json.dumps(endpoint.answer or {"data": rows[::-1]}).encode()
                try:
                    self.send_response(endpoint.status)
                    self.send_header("content-length", str(len(out)))
                    self.end_headers()
                    self.wfile.write(out)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client's deadline passed

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    thread.join()
    endpoint.server.server_close()


def options(endpoint: Endpoint, **more: Any) -> Options:
    return Options(
        embedding_url=endpoint.url, embedding_model="m", embedding_api_key="k", embedding_timeout=2.0, **more
    )


async def embedded(endpoint: Endpoint) -> Index:
    embedder = HttpEmbedder(endpoint.url, "m")
    index = await embed_index(build_index(_SKILLS), embedder)
    await embedder.aclose()
    endpoint.requests.clear()
    endpoint.keys.clear()
    return index


async def test_a_query_finds_skills_across_languages(endpoint: Endpoint) -> None:
    index = await embedded(endpoint)
    retriever = Embedding(options(endpoint))
    retrieval = await retriever.retrieve(["wann soll ich Rosen schneiden?"], index, 2)
    assert (retrieval.mode, retrieval.note) == ("embedding", None)
    assert {hit.name for hit in retrieval.hits} == {"roses", "tomatoes"}
    assert endpoint.requests == [
        {
            "path": "/v1/embeddings",
            "model": "m",
            "input": ["wann soll ich Rosen schneiden?"],
            "encoding_format": "float",
        }
    ]
    assert endpoint.keys == ["Bearer k"]
    await retriever.aclose()


async def test_an_acknowledgement_is_asked_together_with_the_request_before_it(endpoint: Endpoint) -> None:
    retriever = Embedding(options(endpoint))
    await retriever.retrieve(["Rosen schneiden", "ja bitte"], await embedded(endpoint), 2)
    assert endpoint.requests[0]["input"] == ["Rosen schneiden\nja bitte"]
    await retriever.aclose()


async def test_a_text_that_is_near_to_no_skill_gets_nothing(endpoint: Endpoint) -> None:
    index = await embedded(endpoint)
    retriever = Embedding(options(endpoint))
    endpoint.answer = {"data": [{"index": 0, "embedding": [-1.0, -1.0, 0.1]}]}
    retrieval = await retriever.retrieve(["hello"], index, 6)
    assert (retrieval.hits, retrieval.mode) == ((), "embedding")
    await retriever.aclose()


def test_the_nearness_that_is_needed_is_taken_from_the_library() -> None:
    vectors = unit_rows([[1, 0, 0], [0.9, 0.1, 0], [0.8, 0, 0.1]], 3)
    assert 0.98 < nearness(vectors) < 1.0
    assert nearness(vectors[:1]) == 0.0


async def test_a_late_answer_falls_back_to_tfidf_and_the_endpoint_is_left_alone_for_a_while(endpoint: Endpoint) -> None:
    index = await embedded(endpoint)
    endpoint.delay = 0.5
    retriever = Embedding(Options(embedding_url=endpoint.url, embedding_model="m", embedding_timeout=0.05))
    start = time.monotonic()
    retrieval = await retriever.retrieve(["prune the roses in march"], index, 2)
    assert time.monotonic() - start < 0.4
    assert (retrieval.mode, retrieval.hits[0].name) == ("tfidf", "roses")
    assert retrieval.note == f"{endpoint.url}/embeddings gave no vectors within 0.05 s."
    again = await retriever.retrieve(["prune the roses in march"], index, 2)
    assert again.note == "the model failed a moment ago"
    assert len(endpoint.requests) == 1
    await retriever.aclose()


async def test_waiting_for_a_vector_does_not_hold_up_the_loop(endpoint: Endpoint) -> None:
    index = await embedded(endpoint)
    endpoint.delay = 0.2
    retriever = Embedding(options(endpoint))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    await retriever.retrieve(["python"], index, 1)
    ticking.cancel()
    assert ticks >= 5
    await retriever.aclose()


@pytest.mark.parametrize(
    ("status", "answer", "reason"),
    [
        (500, None, r"gave no vectors \(HTTPStatusError"),
        (200, {"error": "no"}, "answered with something else than vectors"),
        (200, {"data": [{"index": 0, "embedding": ["x"]}]}, "answered with something else than vectors"),
        (200, {"data": [{"index": 0, "embedding": [float("nan")]}]}, "answered with something else than vectors"),
        (200, {"data": []}, "answered with something else than vectors"),
    ],
)
async def test_what_is_no_vector_is_refused(endpoint: Endpoint, status: int, answer: Any, reason: str) -> None:
    endpoint.status, endpoint.answer = status, answer
    embedder = HttpEmbedder(endpoint.url, "m")
    with pytest.raises(EmbeddingError, match=reason):
        await embedder.embed(["a"], 2.0)
    await embedder.aclose()


async def test_an_endpoint_that_is_not_there_falls_back(endpoint: Endpoint) -> None:
    index = await embedded(endpoint)
    retriever = Embedding(Options(embedding_url="http://127.0.0.1:9/v1", embedding_model="m", embedding_timeout=2.0))
    retrieval = await retriever.retrieve(["prune the roses in march"], index, 2)
    assert retrieval.mode == "tfidf"
    assert retrieval.note is not None
    assert "ConnectError" in retrieval.note
    await retriever.aclose()


async def test_an_index_without_vectors_or_of_another_model_falls_back_without_a_call(endpoint: Endpoint) -> None:
    retriever = Embedding(options(endpoint))
    retrieval = await retriever.retrieve(["prune the roses"], build_index(_SKILLS), 2)
    assert (retrieval.mode, retrieval.note) == ("tfidf", "the index has no vectors of m")
    assert endpoint.requests == []
    await retriever.aclose()


async def test_only_new_skills_are_embedded_again(endpoint: Endpoint) -> None:
    index = await embedded(endpoint)
    embedder = HttpEmbedder(endpoint.url, "m")
    assert await embed_index(index, embedder) is index
    newer = build_index([*_SKILLS[1:], Skill("roses", "Water roses."), Skill("lawn", "Mow it.")])
    result = await embed_index(newer, embedder, known=index)
    assert [text.split("\n")[0] for request in endpoint.requests for text in request["input"]] == ["roses", "lawn"]
    assert result.state.vectors is not None
    assert result.state.vectors.shape == (5, 3)
    assert result.state.vectors[0].tolist() == index.state.vectors[1].tolist()  # type: ignore[index]
    added = index.add(Skill("tulips", "Plant tulips."))
    assert [hit.name for hit in added.search("plant tulips", cutoff=0)] == ["tulips"]
    assert (await embed_index(added, embedder)).state.vectors.any(axis=1).all()  # type: ignore[union-attr]
    await embedder.aclose()


_CHILD = """
import json, sys, time
for line in sys.stdin:
    texts = json.loads(line)
    time.sleep(0.5 if texts == ["slow"] else 0)
    print(json.dumps([[len(t), 1.0] for t in texts]), flush=True)
"""


async def test_a_local_model_answers_from_a_child_process_that_ends_with_us() -> None:
    embedder = ProcessEmbedder("local", [sys.executable, "-c", _CHILD])
    rows = await embedder.embed(["a", "abc"], 10.0)
    assert np.allclose(rows, [[0.7071, 0.7071], [0.9487, 0.3162]], atol=1e-4)
    with pytest.raises(EmbeddingError, match=r"The local model local gave no vectors within 0\.1 s"):
        await embedder.embed(["slow"], 0.1)
    assert np.allclose(await embedder.embed(["abc"], 10.0), [[0.9487, 0.3162]], atol=1e-4)  # not the late answer
    child = embedder._child
    await embedder.aclose()
    assert child is not None
    assert child.returncode == 0


async def test_a_child_that_ends_is_an_error_with_advice() -> None:
    embedder = ProcessEmbedder("local", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(EmbeddingError, match=r"metaclaw-mitmproxy\[embed\]"):
        await embedder.embed(["a"], 10.0)
    await embedder.aclose()


def test_the_settings_choose_the_model() -> None:
    assert isinstance(create_embedder(Options(embedding_model="m")), ProcessEmbedder)
    with pytest.raises(ConfigError, match=r"skills\.embedding_model is not set"):
        create_embedder(Options())
