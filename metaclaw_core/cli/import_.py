"""``metaclaw import``: captured flows into the store, without mitmdump."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from metaclaw_core.cli.output import json_line, opened_store
from metaclaw_core.errors import CaptureError
from metaclaw_core.model import Exchange

_BATCH_ROWS = 64
_BATCH_BYTES = 16 * 1024 * 1024  # of bodies: 64 large ones would fill the memory
_PROBLEM_LENGTH = 300  # mitmproxy quotes what it can't read, however long that is


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file.")
def command(files: tuple[Path, ...], as_json: bool) -> None:
    """Record the LLM exchanges of mitmproxy captures (-w) and HAR files.

    Importing a file twice adds nothing, nor does a capture of traffic that was recorded live. Nothing is
    sent anywhere. Exit status 1 if a file could not be read to its end.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from metaclaw_core.proxy.capture import principal_key
    from metaclaw_core.proxy.readflows import read_exchanges
    from metaclaw_core.settings import home

    key = principal_key(home())
    console = Console(stderr=True)
    failed = False
    with (
        opened_store() as store,
        Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress,
    ):
        for path in files:
            counts = {"new": 0, "known": 0, "skipped": 0, "passed_over": 0, "failed": 0}
            problem: str | None = None
            batch: list[Exchange] = []
            size = 0

            def flush(batch: list[Exchange] = batch, counts: dict[str, int] = counts, path: Path = path) -> None:
                report = store.ingest(batch)
                counts["new"] += report.stored
                counts["known"] += report.duplicates
                counts["skipped"] += report.skipped
                counts["failed"] += len(report.failed)
                for _, why in report.failed:
                    click.echo(f"metaclaw: an exchange of {path} could not be stored: {why}", err=True)
                batch.clear()

            try:
                with path.open("rb") as file:
                    bar = progress.add_task(path.name, total=path.stat().st_size)
                    for exchange in read_exchanges(file, str(path), key):
                        if exchange is None:
                            counts["passed_over"] += 1
                        else:
                            batch.append(exchange)
                            size += len(exchange.request_body) + len(exchange.response_body)
                        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                            flush()
                            size = 0
                        progress.update(bar, completed=file.tell())
            except OSError as e:
                problem = f"{path} can't be read: {e.strerror}."
            except CaptureError as e:
                problem = str(e) if len(str(e)) <= _PROBLEM_LENGTH else f"{str(e)[:_PROBLEM_LENGTH]} …"
            except MemoryError:  # four bytes can claim that a terabyte follows
                problem = f"{path} is neither a mitmproxy capture nor a HAR file, or larger than the memory."
            flush()
            failed = failed or problem is not None or counts["failed"] > 0
            if as_json:
                json_line({"file": str(path), **counts, "problem": problem})
                continue
            useless = f" ({counts['skipped']} of no use for learning)" if counts["skipped"] else ""
            click.echo(
                f"{path}: {counts['new']} new exchanges{useless}, {counts['known']} known already, {counts['passed_over']} other flows."
            )
            if problem:
                click.echo(f"metaclaw: {problem}", err=True)
    sys.exit(1 if failed else 0)
