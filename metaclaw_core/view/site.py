"""The pages: a path in, a status and HTML out. No request, no cookie, no socket in here (`server` has these).

Design: every page is rendered whole from the store and the library. All text of people, models and tools is data: Jinja
escapes whatever a template prints (autoescape, no `safe` anywhere), and before that `clean` takes out control
characters, so a template can't forget either. A template that misspells a name fails (StrictUndefined).

Limits: the newest exchanges are taken in at most once a second; where another process is at it that is said on the page
once it has been waited for.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metaclaw_core.skills.library import Library
from metaclaw_core.skills.skill import Status
from metaclaw_core.store.drain import drain_under_lease
from metaclaw_core.store.rollouts import Store
from metaclaw_core.view import reading, words
from metaclaw_core.view.messages import said, split
from metaclaw_core.view.training import charts, training

_DRAIN_SECONDS = 1.0
_STATIC = {
    "/static/style.css": "text/css; charset=utf-8",
    "/static/live.js": "text/javascript; charset=utf-8",
    "/static/icon.svg": "image/svg+xml",
}
_HTML = "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Reply:
    status: HTTPStatus
    type: str
    body: bytes


class Site:
    """Any thread may ask. `library` may be one that reads its folders at each call."""

    def __init__(self, store: Store, library: Library, spool: Path) -> None:
        self._store = store
        self._library = library
        self._spool = spool
        self._draining = threading.Lock()
        self._drained_at = -_DRAIN_SECONDS
        self._problems: tuple[str, ...] = ()

    # --- routes -------------------------------------------------------------------------------

    def has(self, path: str) -> bool:
        """Whether a page is there, as far as its path tells."""
        return path in _STATIC or any(route.fullmatch(path) for route, _ in _ROUTES)

    def reply(self, path: str, asked: Mapping[str, str]) -> Reply:
        """What is at a path; `asked` is its query. Raises MetaClawError where the store or the library can't be used."""
        if path in _STATIC:
            return Reply(HTTPStatus.OK, _STATIC[path], (files("metaclaw_core.view") / path.lstrip("/")).read_bytes())
        for route, page in _ROUTES:
            if found := route.fullmatch(path):
                self._take_in()
                return page(self, found, asked) or self.message(HTTPStatus.NOT_FOUND, "There is nothing of that name here.")
        return self.message(HTTPStatus.NOT_FOUND, "There is no such page.")

    def message(self, status: HTTPStatus, text: str, *, go_to: str | None = None) -> Reply:
        """A page that says one thing; with `go_to` it moves on to that path by itself."""
        body = self._render("message.html", title=status.phrase if go_to is None else "MetaClaw", text=text, go_to=go_to)
        return Reply(status, _HTML, body)

    # --- pages --------------------------------------------------------------------------------

    def _sessions(self, _found: re.Match[str], asked: Mapping[str, str]) -> Reply | None:
        page = reading.sessions_page(self._store, _page_number(asked))
        states = reading.turn_states(self._store)
        return self._page("sessions.html", page=page, states=states, learning=reading.learning(self._store, limit=1))

    def _session(self, found: re.Match[str], asked: Mapping[str, str]) -> Reply | None:
        session = reading.session(self._store, found[1])
        if session is None:
            return None
        page = reading.turns_page(self._store, found[1], _page_number(asked))
        return self._page("session.html", session=session, page=page, groups=reading.grouped(page.rows))

    def _turn(self, found: re.Match[str], _asked: Mapping[str, str]) -> Reply | None:
        detail = reading.turn(self._store, int(found[1]))
        if detail is None:
            return None
        system, earlier, current = split(detail.messages, detail.row["user_text"])
        answer = said(detail.response) if detail.response is not None else None
        return self._page("turn.html", detail=detail, row=detail.row, system=system, earlier=earlier, current=current, answer=answer)

    def _skills(self, _found: re.Match[str], _asked: Mapping[str, str]) -> Reply | None:
        scan = self._library.scan()
        used = reading.skill_figures(self._store)
        by_status = {status: [s for s in scan.skills if s.status is status] for status in Status}
        by_status[Status.CANDIDATE] = list(scan.candidates)
        for of_status in by_status.values():
            of_status.sort(key=lambda s: (-(used[s.name].turns if s.name in used else 0), s.name))
        known = {skill.name for skill in (*scan.skills, *scan.candidates)}
        return self._page(
            "skills.html", by_status=by_status, used=used, gone=sorted(set(used) - known), problems=scan.problems
        )

    def _skill(self, _found: re.Match[str], asked: Mapping[str, str]) -> Reply | None:
        name = asked.get("name", "")
        scan = self._library.scan()
        versions = [skill for skill in (*scan.skills, *scan.candidates) if skill.name == name]
        used = reading.skill_figures(self._store).get(name)
        if not versions and used is None:
            return None
        return self._page(
            "skill.html",
            name=name,
            versions=versions,
            used=used,
            uses=reading.uses_of(self._store, name),
            decisions=reading.decisions_on(self._store, name),
        )

    def _worker(self, _found: re.Match[str], _asked: Mapping[str, str]) -> Reply | None:
        return self._page("worker.html", learning=reading.learning(self._store))

    def _training(self, _found: re.Match[str], _asked: Mapping[str, str]) -> Reply | None:
        found = training(self._store)
        return self._page("training.html", training=found, charts=charts(found.steps))

    # --- rendering ----------------------------------------------------------------------------

    def _page(self, template: str, **values: Any) -> Reply:
        return Reply(HTTPStatus.OK, _HTML, self._render(template, **values))

    def _render(self, template: str, **values: Any) -> bytes:
        return self._templates.get_template(template).render(**values, drain_problems=self._problems).encode()

    @cached_property
    def _templates(self) -> Environment:
        return templates()

    def _take_in(self) -> None:
        with self._draining:
            if time.monotonic() - self._drained_at < _DRAIN_SECONDS:
                return
            self._problems = drain_under_lease(self._store, self._spool).problems
            self._drained_at = time.monotonic()


type _PageFunction = Callable[[Site, re.Match[str], Mapping[str, str]], Reply | None]

# What a path may hold is said here: no route takes a path that another host or scheme could be read from.
_ROUTES: tuple[tuple[re.Pattern[str], _PageFunction], ...] = (
    (re.compile(r"/"), Site._sessions),
    (re.compile(r"/session/([0-9a-f]{1,64})"), Site._session),
    (re.compile(r"/turn/([0-9]{1,18})"), Site._turn),
    (re.compile(r"/skills"), Site._skills),
    (re.compile(r"/skill"), Site._skill),
    (re.compile(r"/worker"), Site._worker),
    (re.compile(r"/training"), Site._training),
)


def templates() -> Environment:
    """The page's templates: they escape whatever they print."""
    environment = Environment(
        loader=PackageLoader("metaclaw_core.view"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "line": words.one_line,
        "when": words.when,
        "number": words.number,
        "figure": words.figure,
        "ms": words.milliseconds,
        "score": words.score,
        "answer": words.answer,
        "url": lambda text: quote(words.clean(text), safe=""),
    }
    return environment


def report(store: Store, now: float) -> str:
    """What training did, as one HTML file that needs no other. `now`: unix seconds."""
    found = training(store)
    style = Markup((files("metaclaw_core.view") / "static/style.css").read_text())  # noqa: S704 - our own file
    page: str = templates().get_template("report.html").render(training=found, charts=charts(found.steps), style=style, now=now)
    return page


def query_of(text: str) -> dict[str, str]:
    """The fields of a URL's query, the first of each name; {} for what is none."""
    try:
        return {name: values[0] for name, values in parse_qs(text, max_num_fields=20).items()}
    except ValueError:  # too many fields
        return {}


def _finalize(value: Any) -> Any:
    """What a template prints: unknown as such, text without control characters, what is HTML already as it is."""
    if value is None:
        return words.UNKNOWN
    return words.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _page_number(asked: Mapping[str, str]) -> int:
    text = asked.get("page", "")
    return max(1, int(text)) if re.fullmatch(r"[0-9]{1,6}", text) else 1
