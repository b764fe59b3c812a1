"""Connections, transactions and migrations.

SQLite runs in WAL mode with `synchronous=FULL`: a commit that returned survives a crash of the process and of the
machine. Writers begin with `BEGIN IMMEDIATE`, so that two of them queue for the lock instead of failing half-way.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, make_url

from serve.registry.errors import InvalidInput, RegistryNotMigrated

BUSY_TIMEOUT_MS = 30_000
_WRITE = "imprint_write"
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 7_210_771_001  # any fixed number: PostgreSQL's advisory lock for schema changes
# PostgreSQL: serialization failure, deadlock, and a unique row that a concurrent transaction made first.
_RETRY_SQLSTATES = frozenset({"40001", "40P01", "23505"})
_ATTEMPTS = 4
T = TypeVar("T")


class Database:
    """An engine with one way to read and one way to write. Safe to share between threads, not across a fork."""

    def __init__(self, url: str) -> None:
        """`url` is an SQLAlchemy URL: `sqlite:///path` or `postgresql+psycopg://…`. Raises InvalidInput for others."""
        self.url = _checked(url)
        self._engine = _engine(self.url)
        # SQLite's transactions see one state anyway.
        snapshot = {} if self._engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        self._reader = self._engine.execution_options(**snapshot)
        self._writer = self._engine.execution_options(**{_WRITE: True})

    @property
    def sqlite_path(self) -> Path | None:
        """The file of an SQLite database, None for others."""
        return _sqlite_path(self.url)

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction that sees one state and never waits for writers."""
        with self._reader.connect() as connection, connection.begin():
            return work(connection)

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` and commit; `work` may be run again when PostgreSQL asks for that, so it must only use SQL."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._writer.begin() as connection:
                    return work(connection)
            except sa.exc.DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) not in _RETRY_SQLSTATES or attempt == _ATTEMPTS:
                    raise
                time.sleep(0.01 * attempt)
        raise AssertionError("unreachable")

    def verify(self) -> None:
        """Raise RegistryNotMigrated unless the schema is at this program's revision. Changes nothing."""
        path = _sqlite_path(self.url)
        if path is not None and not path.exists():
            raise RegistryNotMigrated(f"There is no registry at {path} yet; start the server once, it makes one.")
        wanted = _wanted_revision()
        with self._engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found != wanted:
            raise RegistryNotMigrated(
                f"The registry is at schema revision {found or 'none'}, this program needs {wanted}; "
                "start the server once to migrate it, or use the program version that it belongs to."
            )

    def close(self) -> None:
        """Close all pooled connections."""
        self._engine.dispose()


def migrate(url: str) -> str:
    """Bring the database to this program's schema, making it (and an SQLite file's folder) first where needed.

    Returns the revision. Several processes may call it at once: one migrates, the others wait. Raises
    RegistryNotMigrated when the database was made by a newer program, and leaves it as it is.
    """
    parsed = _checked(url)
    path = _sqlite_path(parsed)
    if path is not None:
        _prepare_sqlite(path)
    # SQLite can change a table only by making it anew, which foreign keys to it would forbid; they are checked after.
    engine = _engine(parsed, foreign_keys=False)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    try:
        with engine.execution_options(**{_WRITE: True}).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            found = MigrationContext.configure(connection).get_current_revision()
            if found is not None and found not in known:
                raise RegistryNotMigrated(f"The registry is at schema revision {found}, newer than this program.")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if path is not None and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
                raise RuntimeError(f"The migration left {len(broken)} rows that refer to nothing; it is undone.")
    finally:
        engine.dispose()
    return _wanted_revision()


def _wanted_revision() -> str:
    head = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    if head is None:
        raise RuntimeError("the package holds no migrations")
    return head


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except sa.exc.ArgumentError as error:
        raise InvalidInput("The registry URL is not a database URL.") from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed
    raise InvalidInput("The registry URL must name a SQLite file (sqlite:///path) or a PostgreSQL database.")


def _sqlite_path(url: URL) -> Path | None:
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def _prepare_sqlite(path: Path) -> None:
    """Make the file, readable by its owner alone (it holds documents), and switch it to WAL, which it remembers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] == "wal":
                return
            raise RuntimeError(f"SQLite cannot use write-ahead logging at {path} (a network file system?)")
        except sqlite3.OperationalError:
            # The switch needs the file for itself and does not honour busy_timeout; another process may be at it.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        finally:
            connection.close()


def _engine(url: URL, foreign_keys: bool = True) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True, pool_size=8, max_overflow=56, hide_parameters=True)
    # Each connection that is kept holds two files and up to 2 MiB of pages. With sixteen threads a read was seen to
    # cost the same CPU whether eight are kept or one.
    engine = sa.create_engine(url, pool_size=2, max_overflow=62, pool_use_lifo=True, hide_parameters=True)

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get(_WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
