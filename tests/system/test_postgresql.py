"""The registry on PostgreSQL where it differs from SQLite: writers side by side, row locks, a server that crashes.

All other tests of the registry (tests/serve/test_registry_*.py) run on PostgreSQL too, as their `[postgresql]` cases.
"""

from __future__ import annotations

import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve.registry import LeaseLost, Registry, migrate
from serve.registry.database import Database
from serve.registry.documents import lock_document
from serve.registry.keys import create_tenant
from serve.registry.posting import Post, post_document
from serve.registry.publishing import publish
from serve.registry.records import ChangeEvent, PostResult
from serve.registry.tables import adapters, documents
from tests.postgresql import Cluster, running_cluster
from tests.serve.registry_helpers import centroids, new_adapter, one_part
from tests.system.registry_processes import (
    at_once,
    make_adapters,
    post_versions,
    publish_all,
    results,
    update_and_delete,
)

pytestmark = pytest.mark.system
IMPRINT = Path(sysconfig.get_path("scripts")) / "imprint"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server of this module's own, since one of its tests kills it."""
    with running_cluster() as running:
        yield running


@pytest.fixture
def url(cluster: Cluster) -> Iterator[str]:
    with cluster.database() as made:
        migrate(made)
        yield made


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    with closing(Registry.open(url)) as opened:
        yield opened


@pytest.fixture
def acme(registry: Registry) -> str:
    return registry.create_tenant("acme").id


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database(url)) as opened:
        yield opened


def until_one_waits(registry: Registry) -> None:
    """Return once some connection of this database waits for a lock."""
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + 30
    while registry._db.read(lambda c: c.execute(waiting).scalar_one()) == 0:
        assert time.monotonic() < deadline, "nobody waits"
        time.sleep(0.01)


# Several processes


def test_processes_never_share_a_job(url: str, registry: Registry, acme: str) -> None:
    tenants = [acme, registry.create_tenant("beta").id]
    posted = [(tenant, registry.post_document(tenant, f"T{n}", "x").job.id) for n in range(30) for tenant in tenants]
    made = results(*((make_adapters, url, f"w{n}", len(posted)) for n in range(3)))
    assert sorted(job_id for own in made for job_id, _ in own) == sorted(job_id for _, job_id in posted)
    assert sum(bool(own) for own in made) > 1, "one process had done all before the others came"
    jobs = [registry.get_job(tenant, job_id) for tenant, job_id in posted]
    assert {(job.state, job.attempts) for job in jobs if job is not None} == {("succeeded", 1)}


def test_of_processes_that_hold_the_same_lease_one_publishes(url: str, registry: Registry, acme: str) -> None:
    job_ids = [registry.post_document(acme, f"T{n}", "x").job.id for n in range(25)]
    assert len(registry.lease_jobs("twin", 100, 60)) == 25
    first, second = results((publish_all, url, "twin", job_ids), (publish_all, url, "twin", job_ids))
    assert sorted(first + second) == sorted(job_ids)
    assert len(registry.list_adapters(acme, 100).items) == len(registry.routable(acme)) == 25
    assert [event.seq for event in registry.changes_since(acme, 0)] == list(range(1, 26))


def test_the_newest_version_wins_however_publications_and_posts_meet(url: str, registry: Registry, acme: str) -> None:
    texts = [f"text {n}" for n in range(20)]
    numbers, *made = results(
        (post_versions, url, acme, "ext", texts), (make_adapters, url, "w1", 20), (make_adapters, url, "w2", 20)
    )
    assert numbers == list(range(1, 21))
    adapter_of = {job_id: adapter_id for own in made for job_id, adapter_id in own}
    document = registry.get_document(acme, "ext")
    assert document is not None and (document.state, document.current_version) == ("ready", 20)
    assert document.adapter_id == adapter_of[document.job_id]
    adapters = registry.list_adapters(acme, 100).items
    assert [one.id for one in adapters if one.retired_at is None] == [document.adapter_id] and len(adapters) == 20
    events = registry.changes_since(acme, 0)
    published = [event for event in events if event.kind == "adapter_published"]
    assert published[-1].adapter_id == document.adapter_id
    # Each publication retires just what the one before it has brought: none saw a state that was never committed.
    assert [event.retired_adapter_ids for event in published] == [
        (), *((event.adapter_id,) for event in published[:-1])
    ]  # fmt: skip


def test_the_same_document_posted_by_processes_at_once_is_one(url: str, registry: Registry, acme: str) -> None:
    found = results(*((post_versions, url, acme, f"ext-{n % 2}", ["same"] * 10) for n in range(4)))
    assert found == [[1] * 10] * 4
    assert len(registry.list_documents(acme).items) == registry.count_jobs()["queued"] == 2


def test_a_follower_misses_nothing_while_processes_write(url: str, registry: Registry, acme: str) -> None:
    """A number must never be seen before all smaller ones: the follower would not go back for them."""
    names = [f"ext-{n}" for n in range(40)]
    for name in names:
        registry.post_document(acme, name, "text", name)
    seen: list[int] = []
    routable: dict[str, str] = {}  # document -> adapter, kept as a router keeps its index
    polls = 0
    with at_once(
        (make_adapters, url, "w1", 40), (make_adapters, url, "w2", 40), (update_and_delete, url, acme, names)
    ) as writers:
        finished = False
        while not finished:
            finished = all(writer.done() for writer in writers)
            head = registry.head(acme)
            events = registry.changes_since(acme, len(seen))
            assert [event.seq for event in events] == list(range(len(seen) + 1, len(seen) + 1 + len(events)))
            assert len(seen) + len(events) >= head, "all that the head promises is there"
            touched = {event.document_id for event in events}
            now = registry.routable(acme, sorted(touched))
            routable = {key: value for key, value in routable.items() if key not in touched}
            routable |= {one.document_id: one.adapter_id for one in now}
            seen += [event.seq for event in events]
            polls += bool(events)
        for writer in writers:
            writer.result()
    assert polls > 5, "the writers were done before anything could be followed"
    assert routable == {one.document_id: one.adapter_id for one in registry.routable(acme)} and len(routable) == 20


# Locks


@pytest.mark.parametrize("commits", [True, False])
def test_an_uncommitted_change_is_invisible_and_holds_the_next_one_of_its_tenant(
    registry: Registry, database: Database, acme: str, commits: bool
) -> None:
    beta = registry.create_tenant("beta").id
    first, second, other = (registry.post_document(tenant, "T", text).job.id
                            for tenant, text in ((acme, "1"), (acme, "2"), (beta, "3")))  # fmt: skip
    registry.lease_jobs("w", 3, 60)
    early, late = new_adapter(), new_adapter()
    begun, go_on = threading.Event(), threading.Event()

    def hold(connection: sa.Connection) -> None:
        publish(connection, time.time(), first, "w", [(early, centroids())])
        begun.set()
        assert go_on.wait(60)
        if not commits:
            raise InterruptedError

    with ThreadPoolExecutor(2) as pool:
        holder = pool.submit(database.write, hold)
        assert begun.wait(30)
        waiter = pool.submit(registry.publish, second, "w", [(late, centroids())])
        until_one_waits(registry)
        assert registry.head(acme) == 0 and registry.changes_since(acme, 0) == registry.routable(acme) == []
        assert registry.publish(other, "w", one_part()).seq == 1, "other tenants do not wait"
        assert not waiter.done()
        go_on.set()
        assert (holder.exception(30) is None) == commits
        waiter.result(30)
    expected = [early.id, late.id] if commits else [late.id]
    assert [event.adapter_id for event in registry.changes_since(acme, 0)] == expected
    assert [event.seq for event in registry.changes_since(acme, 0)] == list(range(1, len(expected) + 1))


def test_a_publication_waits_for_a_new_version_that_is_being_posted(
    registry: Registry, database: Database, acme: str
) -> None:
    old = registry.post_document(acme, "T", "one", "ext")
    registry.lease_jobs("w", 1, 60)

    def post_meanwhile(connection: sa.Connection) -> Future[ChangeEvent]:
        post_document(connection, time.time(), acme, Post("T", "two", "ext", None, None, None, None))
        publication = pool.submit(registry.publish, old.job.id, "w", one_part())
        until_one_waits(registry)
        return publication

    with ThreadPoolExecutor(1) as pool:
        publication = database.write(post_meanwhile)
        assert publication.result(30).kind == "adapter_superseded", "it must see the version that it waited for"
    document = registry.get_document(acme, "ext")
    assert document is not None and (document.latest_version, document.adapter_id) == (2, None)


def test_a_refinement_loses_to_a_new_version_that_is_being_posted(
    registry: Registry, database: Database, acme: str
) -> None:
    first = registry.post_document(acme, "T", "one", "ext")
    registry.lease_jobs("w", 1, 60)
    started_from = registry.publish(first.job.id, "w", one_part(), refine_after_s=0).adapter_id
    (leased,) = registry.lease_jobs("w", 1, 60)

    def post_meanwhile(connection: sa.Connection) -> Future[ChangeEvent]:
        post_document(connection, time.time(), acme, Post("T", "two", "ext", None, None, None, None))
        refined = pool.submit(
            registry.publish, leased.job.id, "w", one_part(), expected_adapter_ids=[started_from or ""]
        )
        until_one_waits(registry)
        return refined

    with ThreadPoolExecutor(1) as pool:
        refined = database.write(post_meanwhile)
        with pytest.raises(LeaseLost):
            refined.result(30)
    document = registry.get_document(acme, "ext")
    assert document is not None and (document.latest_version, document.adapter_ids) == (2, (started_from,))
    assert registry.count_jobs("refine") == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0}


def test_a_read_sees_one_state(registry: Registry, database: Database, acme: str) -> None:
    """A document and its adapters are read by two statements; nothing may come between."""
    first = registry.post_document(acme, "T", "one", "ext")
    registry.lease_jobs("w", 1, 60)

    def read_around_a_publication(connection: sa.Connection) -> tuple[int, list[str]]:
        before = connection.execute(sa.select(documents.c.latest_version)).scalar_one()
        registry.publish(first.job.id, "w", one_part())
        return before, list(connection.execute(sa.select(adapters.c.id)).scalars())

    assert database.read(read_around_a_publication) == (1, [])
    assert len(registry.current_adapters_of(acme, first.document.id)) == 1


def test_the_same_content_that_is_being_posted_is_found(registry: Registry, database: Database, acme: str) -> None:
    def post_meanwhile(connection: sa.Connection) -> tuple[PostResult, Future[PostResult]]:
        mine = post_document(connection, time.time(), acme, Post("T", "x", None, None, None, None, None))
        theirs = pool.submit(registry.post_document, acme, "T", "x")
        until_one_waits(registry)
        return mine, theirs

    with ThreadPoolExecutor(1) as pool:
        mine, theirs = database.write(post_meanwhile)
        assert theirs.result(30).document.id == mine.document.id and not theirs.result().created
    assert len(registry.list_documents(acme).items) == 1


def test_a_deadlock_is_tried_again(registry: Registry, database: Database, acme: str) -> None:
    one, two = (registry.post_document(acme, title, "x").document.id for title in ("A", "B"))
    both_hold_one = threading.Barrier(2)
    runs: list[str] = []

    def crosswise(name: str, first: str, second: str) -> Callable[[sa.Connection], None]:
        def work(connection: sa.Connection) -> None:
            runs.append(name)
            lock_document(connection, acme, first)
            if runs.count(name) == 1:
                both_hold_one.wait(30)
            lock_document(connection, acme, second)
            connection.execute(documents.update().where(documents.c.id == second).values(title=name))

        return work

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(database.write, crosswise("down", one, two)),
                   pool.submit(database.write, crosswise("up", two, one))]  # fmt: skip
        for writer in writers:
            writer.result(60)
    assert sorted(runs) in (["down", "down", "up"], ["down", "up", "up"])
    assert {document.title for document in registry.list_documents(acme).items} == {"down", "up"}


def test_a_row_that_another_transaction_makes_first_is_found(registry: Registry, database: Database) -> None:
    def make(connection: sa.Connection) -> tuple[str, Future[str]]:
        mine = create_tenant(connection, 0.0, "acme").id
        theirs = pool.submit(lambda: registry.create_tenant("acme").id)
        until_one_waits(registry)
        return mine, theirs

    with ThreadPoolExecutor(1) as pool:
        mine, theirs = database.write(make)
        assert theirs.result(30) == mine


# The server


def test_what_was_acknowledged_survives_a_crash_of_the_server(cluster: Cluster, registry: Registry, acme: str) -> None:
    kept = registry.post_document(acme, "Kept", "durable text", "ext")
    (leased,) = registry.lease_jobs("w", 1, 60)

    def crash(connection: sa.Connection) -> None:
        connection.execute(documents.update().values(title="half"))
        cluster.kill()
        connection.execute(documents.update().values(title="half again"))

    with pytest.raises(sa.exc.OperationalError):
        registry._db.write(crash)
    with pytest.raises(sa.exc.OperationalError) as caught:
        registry.post_document(acme, "Lost", "a secret text")
    assert "a secret text" not in str(caught.value)
    cluster.start()
    # The same object goes on: it replaces the connections that broke.
    document = registry.get_document(acme, "ext")
    assert document is not None and (document.title, document.id) == ("Kept", kept.document.id)
    assert registry.publish(leased.job.id, "w", one_part()).seq == 1
    assert [one.document_title for one in registry.routable(acme)] == ["Kept"]
    assert len(registry.list_documents(acme).items) == 1
    # Nor does anybody notice a restart in a pause, which leaves broken connections in the pool.
    cluster.kill()
    cluster.start()
    assert registry.head(acme) == 1


def test_processes_that_start_together_migrate_once(cluster: Cluster) -> None:
    with cluster.database() as made:
        assert results(*((migrate, made) for _ in range(3))) == [migrate(made)] * 3
        Registry.open(made).close()


def test_the_command_line_takes_a_postgresql_url(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.database() as made:
        # as people write it, without the driver's name
        plain = made.replace("postgresql+psycopg://", "postgresql://")
        config = tmp_path / "cluster.yaml"
        config.write_text(
            "http_options: {host: 127.0.0.1, port: 1}\n"
            "applications:\n"
            "  - name: imprint\n"
            "    import_path: 'serve.app:build'\n"
            f"    args: {{data_dir: '{tmp_path / 'data'}', registry: {{url: '{plain}'}}}}\n"
        )
        command = [IMPRINT, "key", "create", "--tenant", "acme", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        with closing(Registry.open(plain)) as registry:
            principal = registry.authenticate(done.stdout.strip())
        assert principal is not None and [tenant.name for tenant in principal.tenants] == ["acme"]
    assert not list((tmp_path / "data").glob("*.db*")), "no SQLite file beside it"
