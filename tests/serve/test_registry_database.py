"""Migration, revision check, durability."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from serve.registry import InvalidInput, Registry, RegistryNotMigrated, migrate
from serve.registry import database as database_module
from serve.registry.database import Database
from serve.registry.posting import content_hash
from serve.registry.tables import metadata
from tests.serve.registry_helpers import several_parts, url  # noqa: F401

ROOT = Path(__file__).parents[2]
TENANT = "ten_" + "0" * 26
SERVED, WAITING = "doc_" + "1" * 26, "doc_" + "2" * 26


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
    versions = Path(database_module.__file__).parent / "migrations/versions"
    newest = max(path.name[:4] for path in versions.glob("0*.py"))
    assert migrate(url) == migrate(url) == newest
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()
    assert differences == []


def make_revision_0001(url: str) -> None:  # noqa: F811
    """A database as the first release left it, with two versions of a document and one more that waits."""
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True)
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).parent / "migrations"))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        tables = sa.MetaData()
        tables.reflect(connection)

        def insert(table: str, **values: object) -> None:
            connection.execute(tables.tables[table].insert().values(**values))

        insert("tenants", id=TENANT, name="acme", created_at=1.0)
        insert("tenant_heads", tenant_id=TENANT, seq=3)
        insert("tenant_turns", tenant_id=TENANT, turn=1)
        for document, number, versions in ((SERVED, 2, ("one", "two")), (WAITING, 1, ("later",))):
            current = f"adp_{number}" if document == SERVED else None
            insert(
                "documents", id=document, tenant_id=TENANT, title="T", metadata={}, latest_version=number,
                content_hash=content_hash("T", versions[-1]), latest_job_id=f"job_{document}{number}",
                current_version=number if current else None, current_adapter_id=current, created_at=1.0, updated_at=1.0,
            )  # fmt: skip
            for version, text in enumerate(versions, 1):
                job = f"job_{document}{version}"
                insert(
                    "document_versions", document_id=document, number=version, tenant_id=TENANT, title="T", text=text,
                    content_hash=content_hash("T", text), size_bytes=3, created_at=1.0,
                )  # fmt: skip
                insert(
                    "jobs", id=job, tenant_id=TENANT, document_id=document, version=version, fraction=0.0, attempts=1,
                    state="succeeded" if document == SERVED else "queued", stage="x", available_at=1.0, created_at=1.0,
                    updated_at=1.0,
                )  # fmt: skip
                if document == WAITING:
                    continue
                insert(
                    "adapters", id=f"adp_{version}", tenant_id=TENANT, document_id=document, version=version,
                    job_id=job, kind="lora", state="ready", rank=8, alpha=16.5, target_modules=["down_proj"],
                    blob_path=f"adapters/{version}", checksum="0" * 64, size_bytes=2**40, base_fingerprint="b",
                    generator_fingerprint="g", manifest={"chunks": [{"start": 0, "end": 3}]}, created_at=1.0,
                    retired_at=2.0 if version == 1 else None,
                )  # fmt: skip
                insert(
                    "centroids", adapter_id=f"adp_{version}", encoder="e", encoder_version="1", tenant_id=TENANT,
                    count=1, dimension=2, vectors=np.array([1.0, 0.5], dtype="<f4").tobytes(),
                )  # fmt: skip
        for seq, kind, adapter, document in (
            (1, "adapter_published", "adp_1", SERVED),
            (2, "adapters_stale", None, None),
            (3, "adapter_published", "adp_2", SERVED),
        ):
            insert(
                "change_events", tenant_id=TENANT, seq=seq, kind=kind, adapter_id=adapter, document_id=document,
                retired_adapter_ids=[], created_at=1.0,
            )  # fmt: skip
    engine.dispose()


def test_what_the_first_release_stored_is_served_as_before(url: str) -> None:  # noqa: F811
    make_revision_0001(url)
    with pytest.raises(RegistryNotMigrated, match="0001"):
        Registry.open(url)
    migrate(url)
    registry = Registry.open(url)
    document = registry.get_document(TENANT, SERVED)
    assert document is not None and (document.state, document.mode) == ("ready", "document")
    assert (document.adapter_id, document.adapter_ids, document.current_version) == ("adp_2", ("adp_2",), 2)
    version = registry.get_version(TENANT, SERVED, 1)
    assert version is not None and (version.text, version.mode, version.probes) == ("one", "document", ())
    (adapter,) = registry.current_adapters_of(TENANT, SERVED)
    assert (adapter.id, adapter.part, adapter.parts, adapter.size_bytes, adapter.alpha) == ("adp_2", 0, 1, 2**40, 16.5)
    assert (adapter.target_modules, adapter.retired_at) == (("down_proj",), None)
    old = registry.get_adapter(TENANT, "adp_1")
    assert old is not None and (old.part, old.parts, old.retired_at) == (0, 1, 2.0)
    (entry,) = registry.routable(TENANT)
    assert (entry.adapter_id, entry.version, entry.part, entry.parts, entry.spans) == ("adp_2", 2, 0, 1, ((0, 3),))
    assert entry.centroids.tolist() == [[1.0, 0.5]]
    found = registry.resolve_model(TENANT, SERVED)
    assert found is not None and found.adapter_ids == ("adp_2",)
    assert [event.document_id for event in registry.changes_since(TENANT, 0)] == [SERVED, "", SERVED]
    assert not registry.post_document(TENANT, "T", "two").created, "its content is known by the same hash"
    (leased,) = registry.lease_jobs("w", 10, 60)
    assert (leased.document.id, leased.job.kind, leased.job.note) == (WAITING, "generate", None)
    registry.publish(leased.job.id, "w", several_parts(2))
    posted = registry.post_document(TENANT, "T", "three", document_id=SERVED)
    registry.lease_jobs("w", 10, 60)
    assert registry.publish(posted.job.id, "w", several_parts(3)).retired_adapter_ids == ("adp_2",)
    registry.close()
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        with pytest.raises(sa.exc.IntegrityError):
            connection.execute(sa.text("DELETE FROM adapters WHERE id = 'adp_1'"))
    engine.dispose()


def test_a_migration_that_would_leave_rows_without_their_adapter_is_undone(tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/old/r.db"
    make_revision_0001(target)
    engine = sa.create_engine(target)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM adapters WHERE id = 'adp_1'"))  # SQLite lets one, by default
    with pytest.raises(RuntimeError, match="1 rows"):
        migrate(target)
    with engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == "0001"
        columns = {column["name"] for column in sa.inspect(connection).get_columns("adapters")}
    engine.dispose()
    assert "part" not in columns


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
