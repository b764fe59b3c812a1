"""What the registry's tests share: a real database, a clock that tests move, and shorthands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.ids import new_id
from serve.registry import Registry, migrate
from serve.registry.records import ChangeEvent, Document, LeasedJob, NewAdapter, NewCentroids
from tests.postgresql import Cluster


class Clock:
    """Seconds since the epoch, as the test sets them."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.system)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database: SQLite in `make test`, PostgreSQL in `make test-system`."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/data/registry.db"
        return
    cluster: Cluster = request.getfixturevalue("postgresql")
    with cluster.database() as made:
        yield made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(url: str, clock: Clock) -> Iterator[Registry]:
    migrate(url)
    opened = Registry.open(url, clock)
    yield opened
    opened.close()


@pytest.fixture
def acme(registry: Registry) -> str:
    """A tenant's ID."""
    return registry.create_tenant("acme").id


def read(registry: Registry, tenant: str, name: str) -> Document:
    """A document that is there."""
    document = registry.get_document(tenant, name)
    assert document is not None
    return document


def new_adapter(
    base: str = "base-1",
    generator: str = "gen-1",
    state: str = "ready",
    part: int = 0,
    parts: int = 1,
    manifest: dict[str, Any] | None = None,
) -> NewAdapter:
    """An adapter as a generator describes it."""
    return NewAdapter(
        id=new_id("adp"),
        kind="lora",
        rank=8,
        alpha=16.0,
        target_modules=("down_proj",),
        blob_path="adapters/x",
        checksum="0" * 64,
        size_bytes=1234,
        base_fingerprint=base,
        generator_fingerprint=generator,
        manifest={"chunks": [{"index": 0, "start": 4 * part, "end": 4 * part + 4, "tokens": 12}], **(manifest or {})},
        state=state,  # type: ignore[arg-type]
        part=part,
        parts=parts,
    )


def centroids(value: float = 1.0) -> NewCentroids:
    """Two vectors of three dimensions."""
    return NewCentroids("minilm", "1", np.full((2, 3), value, dtype=np.float32))


def one_part(**adapter: Any) -> list[tuple[NewAdapter, NewCentroids]]:
    """What a generator publishes for a document with one adapter."""
    return [(new_adapter(**adapter), centroids())]


def several_parts(count: int, states: Sequence[str] = (), **adapter: Any) -> list[tuple[NewAdapter, NewCentroids]]:
    """What a generator publishes for a document with several adapters, by default all ready."""
    states = states or ["ready"] * count
    return [
        (new_adapter(state=state, part=part, parts=count, **adapter), centroids(part + 1.0))
        for part, state in enumerate(states)
    ]


def lease_one(registry: Registry, worker: str = "w1", lease_s: float = 60.0) -> LeasedJob:
    """Exactly one job."""
    (leased,) = registry.lease_jobs(worker, 1, lease_s)
    return leased


def make_ready(
    registry: Registry,
    tenant_id: str,
    title: str,
    text: str = "text",
    parts: Sequence[tuple[NewAdapter, NewCentroids]] | None = None,
    refine_after_s: float | None = None,
    **post: object,
) -> ChangeEvent:
    """Post a document and publish adapters for it, by default one."""
    posted = registry.post_document(tenant_id, title, text, **post)  # type: ignore[arg-type]
    assert posted.job.id in {leased.job.id for leased in registry.lease_jobs("maker", 1000, 60.0)}
    event = registry.publish(posted.job.id, "maker", parts or one_part(), refine_after_s=refine_after_s)
    registry.release_leases("maker")
    return event
