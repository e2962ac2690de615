"""``metaclaw turns``: recorded exchanges, one JSON object a line or a table."""

from __future__ import annotations

import click

from metaclaw_core.cli.output import json_line, opened_store, table, when
from metaclaw_core.model import Kind

_STATES = ("captured", "scored", "batched", "trained", "skipped", "failed")  # `store.rollouts.State`, which loads slowly
_EMPTY = "No exchange has been recorded yet. `metaclaw start`, or `metaclaw import FILE` for a capture."

@click.command("turns")
@click.option("--session", help="Only this session (the id that `metaclaw sessions` shows).")
@click.option("--kind", type=click.Choice([kind.value for kind in Kind]), help="Only this kind.")
@click.option("--state", type=click.Choice(_STATES), help="Only this state.")
@click.option("--limit", type=click.IntRange(1, 1_000_000_000), help="At most this many, the newest.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(session: str | None, kind: str | None, state: str | None, limit: int | None, as_json: bool) -> None:
    """List recorded exchanges with an LLM, oldest first.

    Each is one request and its answer; those with the same turn_id belong to one message of the human.
    """
    with opened_store() as store:
        rows = store.turns(session=session, kind=kind, state=state, limit=limit)
        if as_json:
            for row in rows:
                json_line(row)
            return
        table(
            ["time", "kind", "session", "model", "user", "assistant", "tokens", "state"],
            (
                (
                    when(row["started_at"]),
                    row["kind"] + (" (retry)" if row["retry"] else ""),
                    (row["session_id"] or "-")[:8],
                    row["model"] or "-",
                    row["user_text"] or "-",
                    row["assistant_text"] or ", ".join(c["name"] for c in row["tool_calls"] or ()) or "-",
                    _tokens(row["usage"]),
                    row["state"] + (f": {row['reason']}" if row["reason"] else ""),
                )
                for row in rows
            ),
            wide=("user", "assistant"),
            empty="No recorded exchange is like that." if session or kind or state else _EMPTY,
        )


def _tokens(usage: dict[str, int | None] | None) -> str:
    if not usage:
        return "-"
    known = [usage.get("input_tokens"), usage.get("output_tokens")]
    return "/".join("?" if n is None else str(n) for n in known)
