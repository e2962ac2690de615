"""How well the skills in a prompt fitted when they were chosen."""

from __future__ import annotations

from sqlalchemy import Connection, text


def m0005_injected_scores(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE turns ADD COLUMN injected_scores TEXT"))
