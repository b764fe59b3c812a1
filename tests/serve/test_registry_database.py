"""Migration, revision check, durability."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from serve.registry import InvalidInput, Registry, RegistryNotMigrated, migrate
from serve.registry.database import Database
from serve.registry.tables import metadata
from tests.serve.registry_helpers import url  # noqa: F401

ROOT = Path(__file__).parents[2]


def test_open_needs_a_migrated_database_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(RegistryNotMigrated, match="no registry"):
        Registry.open(f"sqlite:///{tmp_path}/r.db")
    assert list(tmp_path.iterdir()) == []


def test_empty_older_and_newer_databases_are_refused(url: str) -> None:  # noqa: F811
    migrate(url)
    engine = sa.create_engine(url)
    for revision in ("0000", "9999"):
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
        with pytest.raises(RegistryNotMigrated, match=revision):
            Registry.open(url)
    with pytest.raises(RegistryNotMigrated, match="newer"):
        migrate(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM alembic_version"))
    engine.dispose()
    with pytest.raises(RegistryNotMigrated, match="none"):
        Registry.open(url)


def test_migrations_give_exactly_the_tables_of_the_code(url: str) -> None:  # noqa: F811
    assert migrate(url) == migrate(url) == "0001"
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()
    assert differences == []


def test_concurrent_migrations(url: str) -> None:  # noqa: F811
    errors: list[BaseException] = []

    def work() -> None:
        try:
            migrate(url)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    Registry.open(url).close()


def test_sqlite_settings(tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/r.db"
    migrate(target)
    database = Database(target)
    found = {
        name: database.read(lambda c, n=name: c.exec_driver_sql(f"PRAGMA {n}").scalar_one())  # type: ignore[misc]
        for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    }
    database.close()
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    assert stat.S_IMODE((tmp_path / "r.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("bad", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://u:secret@h/db"])
def test_other_urls_are_refused_without_showing_them(bad: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        migrate(bad)
    assert "secret" not in str(caught.value)


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/r.db"
    migrate(target)
    registry = Registry.open(target)
    registry.create_tenant("before")

    def hold(connection: sa.Connection) -> list[str]:
        connection.execute(sa.text("INSERT INTO tenants VALUES ('ten_x', 'during', 0)"))
        return [tenant.name for tenant in registry.list_tenants()]

    assert registry._db.write(hold) == ["before"]
    assert [tenant.name for tenant in registry.list_tenants()] == ["before", "during"]
    registry.close()


def test_an_acknowledged_document_survives_kill_9_and_a_half_written_one_leaves_nothing(url: str) -> None:  # noqa: F811
    migrate(url)
    script = """
import os, signal, sys
import sqlalchemy as sa
from serve.registry import Registry
registry = Registry.open(sys.argv[1])
tenant = registry.create_tenant("acme")
posted = registry.post_document(tenant.id, "Kept", "durable text")
print(tenant.id, posted.document.id, posted.job.id, flush=True)
def die(connection):
    connection.execute(sa.text("UPDATE documents SET title = 'half'"))
    os.kill(os.getpid(), signal.SIGKILL)
registry._db.write(die)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    tenant_id, document_id, job_id = done.stdout.split()
    registry = Registry.open(url)
    document = registry.get_document(tenant_id, document_id)
    assert document is not None and document.title == "Kept" and document.state == "processing"
    version = registry.get_version(tenant_id, document_id)
    assert version is not None and version.text == "durable text"
    (leased,) = registry.lease_jobs("w", 10, 60)
    assert leased.job.id == job_id and leased.version.text == "durable text"
    registry.close()


def test_errors_of_the_database_do_not_show_documents(tmp_path: Path) -> None:
    migrate(f"sqlite:///{tmp_path}/r.db")
    registry = Registry.open(f"sqlite:///{tmp_path}/r.db")
    with pytest.raises(sa.exc.IntegrityError) as caught:
        registry._db.write(
            lambda c: c.execute(sa.text("INSERT INTO tenants VALUES (:t, NULL, 0)"), {"t": "a secret text"})
        )
    assert "a secret text" not in str(caught.value)
