"""``metaclaw sessions``: recorded sessions, one JSON object a line or a table."""

from __future__ import annotations

import click

from metaclaw_core.cli.output import json_line, opened_store, table, when


@click.command("sessions")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(as_json: bool) -> None:
    """List recorded sessions, oldest first."""
    with opened_store() as store:
        rows = store.sessions()
        if as_json:
            for row in rows:
                json_line(row)
            return
        table(
            ["session", "agent", "turns", "first", "last", "kinds"],
            (
                (
                    row["session_id"] or "-",
                    row["agent"],
                    str(row["turns"]),
                    when(row["first_at"]),
                    when(row["last_at"]),
                    ", ".join(f"{kind} {n}" for kind, n in row["kinds"].items()),
                )
                for row in rows
            ),
            empty="No session has been recorded yet.",
        )
