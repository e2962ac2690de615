"""Opening the database: SQLite by default, PostgreSQL for fleets.

Design: one `Engine` per process. A write transaction says so when it begins: on SQLite it takes the
write lock at once (``BEGIN IMMEDIATE``), so that it can't fail half-way for having read first; readers
never wait (WAL). The driver's own transaction handling is switched off, since it would commit
savepoints behind our back. A new file is made 0600 in a folder 0700; a folder that exists keeps its
mode.

Errors never quote parameters: those are people's conversations.

Limits: WAL needs a local disk; on a network file system use PostgreSQL.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from metaclaw_core.errors import StoreError
from metaclaw_core.store.migrations import migrate
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.spool import create_private

_BUSY_SECONDS = 30


def open_store(target: str | Path) -> Store:
    """The store at a path (SQLite) or database URL, brought up to date. Raises StoreError."""
    return Store(open_engine(target))


def open_engine(target: str | Path) -> Engine:
    """An engine on a migrated database. Raises StoreError."""
    url = _url(target)
    try:
        engine = (
            _sqlite(url)
            if url.get_backend_name() == "sqlite"
            else create_engine(url, pool_pre_ping=True, hide_parameters=True)
        )
        try:
            with write(engine) as connection:
                migrate(connection)
        except BaseException:
            engine.dispose()
            raise
    except OSError as e:
        raise StoreError(
            f"The store {url!r} can't be opened ({e.strerror or e}): make its folder yours, or name another with METACLAW_HOME."
        ) from e
    except (SQLAlchemyError, sqlite3.Error) as e:
        raise StoreError(f"The store {url!r} can't be opened: {_cause(e)}.") from e
    except ImportError as e:
        raise StoreError(f"The driver for {url!r} is missing: pip install 'metaclaw-mitmproxy[postgres]'.") from e
    return engine


@contextmanager
def write(engine: Engine) -> Iterator[Connection]:
    """A write transaction: commits at the end, rolls back on an exception."""
    with engine.connect() as connection:
        connection = connection.execution_options(metaclaw_write=True)
        with connection.begin():
            yield connection


def _url(target: str | Path) -> URL:
    """A path, or text that has a scheme."""
    if isinstance(target, Path) or "://" not in target:
        return URL.create("sqlite", database=str(Path(target).expanduser()))
    try:
        url = make_url(target)
        url.get_dialect()
    except (ArgumentError, NoSuchModuleError) as e:
        raise StoreError("store.url must be a path, sqlite:///PATH or postgresql+psycopg://USER@HOST/DATABASE.") from e
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"store.url names {url.get_backend_name()}; only sqlite and postgresql are supported.")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _sqlite(url: URL) -> Engine:
    path = Path(url.database or "")
    if not url.database or url.database == ":memory:":
        raise StoreError("The store needs a file: an SQLite database in memory can't be shared by processes.")
    create_private(path)
    _use_wal(path)
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own
        # Some keys are hashes, so a batch touches pages all over a large file: a checkpoint every 16 MB of log writes each of them
        # less often than one every 4 MB. Measured at a million turns: ingest at 0.87 of an empty store's rate, not 0.76 (while
        # an exchange took the processor three times as long as now; 32 and 64 MB change nothing).
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON", "journal_size_limit=67108864", "wal_autocheckpoint=4000"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("metaclaw_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(path: Path) -> None:
    """Once per file, not per connection: the switch needs the file for itself and doesn't wait for it."""
    deadline = time.monotonic() + _BUSY_SECONDS
    with contextlib.closing(sqlite3.connect(path)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as e:
                if e.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _cause(e: Exception) -> str:
    """What the driver said, without SQLAlchemy's statement and link."""
    return str(e.orig).strip() if isinstance(e, DBAPIError) and e.orig is not None else str(e)
