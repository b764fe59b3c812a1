"""The PostgreSQL server of the registry's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.postgresql import Cluster, running_cluster


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """One server for all of them; each test makes a database of its own."""
    with running_cluster() as cluster:
        yield cluster
