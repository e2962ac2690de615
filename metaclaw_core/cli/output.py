"""What the listing commands share: the store with the spools drained, JSON lines, tables, times."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from metaclaw_core.settings import home, load_settings
from metaclaw_core.wire.jsonio import dumps

if TYPE_CHECKING:
    from metaclaw_core.store.rollouts import Store


@contextmanager
def opened_store(*, drain: bool = True) -> Iterator[Store]:
    """The store of this home; with `drain`, exchanges that still lie in spools are taken in first."""
    from metaclaw_core.store.db import open_store
    from metaclaw_core.store.drain import drain_under_lease

    settings = load_settings()
    store = open_store(settings.store.url or home() / "store.db")
    try:
        if drain:
            report = drain_under_lease(store, home() / "spool")
            for problem in report.problems:
                click.echo(f"metaclaw: {problem}", err=True)
        yield store
    finally:
        store.close()


def json_line(row: Mapping[str, Any]) -> None:
    """One object on one line; ASCII, so that lone surrogates can't break a pipe."""
    click.echo(dumps(dict(row)))


def when(seconds: float | None) -> str:
    """Local time of unix `seconds`."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%m-%d %H:%M:%S") if seconds is not None else "-"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str, wide: Collection[str] = ()) -> None:
    """A table that fits the terminal, one line a row; the columns in `wide` share what the others leave. `empty` is
    said where there is no row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from metaclaw_core.view.words import one_line

    grid = Table(box=None, pad_edge=False, header_style="bold", expand=bool(wide))
    for head in heads:
        grid.add_column(head, no_wrap=True, overflow="ellipsis", ratio=1 if head in wide else None)
    count = 0
    for row in rows:
        count += 1
        # Text, not markup: what people write to agents is full of square brackets.
        # And clean of control characters: it may hold sequences that a terminal obeys.
        grid.add_row(*(Text(one_line(cell, 200)) for cell in row))
    if count:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(grid)
    else:
        click.echo(empty)
