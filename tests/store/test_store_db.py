"""Opening, migrating, refusing."""

from __future__ import annotations

import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, inspect, text

from metaclaw_core.errors import StoreError
from metaclaw_core.store.db import open_engine, open_store, write
from metaclaw_core.store.migrations import MIGRATIONS, migrate
from metaclaw_core.store.tables import metadata


def test_the_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "store.db"
    with open_store(path) as store:
        list(store.turns())
        assert {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {0o600}
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path.parent.parent)] == [0o700, 0o700]


def test_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    open_store(tmp_path / "store.db").close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_migrations_lead_to_the_tables_as_they_are(database: str) -> None:
    """The steps are frozen and the tables are not: this is what keeps them together."""
    engine = open_engine(database)
    found = inspect(engine)
    assert set(found.get_table_names()) == {*metadata.tables, "metaclaw_migrations"}
    for name, table in metadata.tables.items():
        columns = {c["name"]: (str(c["type"]), c["nullable"]) for c in found.get_columns(name)}
        wanted = {c.name: (c.type.compile(engine.dialect), c.nullable) for c in table.columns}
        assert columns == {
            n: (t.replace("FLOAT", columns[n][0]) if t == "FLOAT" else t, null) for n, (t, null) in wanted.items()
        }
        assert {
            i["name"]: i["column_names"] for i in found.get_indexes(name) if not i.get("duplicates_constraint")
        } == {i.name: [c.name for c in i.columns] for i in table.indexes}
        unique = {u["name"]: u["column_names"] for u in found.get_unique_constraints(name)}
        assert set(unique) == {c.name for c in table.constraints if type(c).__name__ == "UniqueConstraint"}
    engine.dispose()


def test_opening_twice_changes_nothing(database: str) -> None:
    open_store(database).close()
    engine = open_engine(database)
    with engine.connect() as connection:
        names = connection.execute(text("SELECT name FROM metaclaw_migrations ORDER BY name")).scalars().all()
    assert names == [step.__name__ for step in MIGRATIONS]
    engine.dispose()


def test_only_missing_steps_run_and_a_failed_one_leaves_what_was_there(database: str) -> None:
    engine = open_engine(database)

    def m0998_good(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE turns ADD COLUMN mood TEXT"))

    def m0999_bad(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE turns ADD COLUMN lost TEXT"))
        raise StoreError("no")

    with pytest.raises(StoreError, match="no"), write(engine) as connection:
        migrate(connection, (*MIGRATIONS, m0998_good, m0999_bad))
    assert not {"mood", "lost"} & {c["name"] for c in inspect(engine).get_columns("turns")}
    with write(engine) as connection:
        assert migrate(connection, (*MIGRATIONS, m0998_good)) == ["m0998_good"]
    assert "mood" in {c["name"] for c in inspect(engine).get_columns("turns")}
    engine.dispose()


def test_a_newer_database_is_refused_with_a_sentence(database: str) -> None:
    engine = open_engine(database)
    with write(engine) as connection:
        connection.execute(text("INSERT INTO metaclaw_migrations VALUES ('m0999_future', 0)"))
    engine.dispose()
    with pytest.raises(StoreError, match=r"was written by a newer MetaClaw \(it has m0999_future\); upgrade MetaClaw"):
        open_store(database)


def test_another_programs_database_is_refused(database: str) -> None:
    engine = open_engine(database)
    with write(engine) as connection:
        connection.execute(text("DROP TABLE metaclaw_migrations"))
    engine.dispose()
    with pytest.raises(StoreError, match="holds tables of another program"):
        open_store(database)


def test_two_that_open_at_once_migrate_once(database: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(open_store, [database] * 4))
    assert [list(store.turns()) for store in stores] == [[], [], [], []]
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("mysql://host/db", "store.url names mysql; only sqlite and postgresql are supported"),
        ("nonsense://host/db", "store.url must be a path"),
        ("sqlite://", "The store needs a file"),
        ("postgresql://127.0.0.1:1/none", "can't be opened"),
        ("/dev/null/store.db", "can't be opened"),
    ],
)
def test_an_unusable_target_is_a_sentence(target: str, sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence):
        open_store(target)


def test_a_password_is_never_printed() -> None:
    with pytest.raises(StoreError) as e:
        open_store("postgresql://user:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(e.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"hello " * 1000)
    with pytest.raises(StoreError, match="file is not a database"):
        open_store(tmp_path / "store.db")


def test_a_savepoint_can_be_undone_inside_a_transaction(database: str) -> None:
    """The stock SQLite driver commits behind a savepoint's back; this is why `db` takes transactions over."""
    engine = open_engine(database)
    insert = "INSERT INTO leases VALUES ('{}', 'me', 0)"
    with engine.connect() as connection:
        connection.execute(text(insert.format("first")))
        savepoint = connection.begin_nested()
        connection.execute(text(insert.format("undone")))
        savepoint.rollback()
        assert connection.execute(text("SELECT name FROM leases")).scalars().all() == ["first"]
        connection.rollback()
        assert connection.execute(text("SELECT count(*) FROM leases")).scalar() == 0
    engine.dispose()


def test_readers_go_on_while_a_writer_is_at_work(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "store.db")
    with write(engine) as writing:
        writing.execute(text("INSERT INTO leases VALUES ('a', 'me', 0)"))
        with engine.connect() as reading:
            assert reading.execute(text("SELECT count(*) FROM leases")).scalar() == 0
    engine.dispose()
    with sqlite3.connect(tmp_path / "store.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
