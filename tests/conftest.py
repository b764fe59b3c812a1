"""One real server (Ray Serve, vLLM, the shipped nano models) for the whole suite, and the order that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import Server


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_server: starts servers of its own, so it runs last, without the shared one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that drive the shared server first, then all that need none, then those with servers of their own."""

    def turn(item: pytest.Item) -> int:
        if item.get_closest_marker("own_server"):
            return 2
        return 0 if "server" in getattr(item, "fixturenames", ()) else 1

    items.sort(key=turn)


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    shared = Server(tmp_path_factory.mktemp("server"))
    yield shared
    shared.stop()


@pytest.fixture(autouse=True)
def _shared_only_while_needed(request: pytest.FixtureRequest, _shared: Server) -> None:
    """End the shared server after its last test, so that it does not slow down those that need none."""
    if "server" not in request.fixturenames:
        _shared.stop()


@pytest.fixture
def server(_shared: Server) -> Server:
    """The running server, started by the first test that asks for it."""
    _shared.start()
    return _shared


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server for one test to start, stop and kill."""
    own = Server(tmp_path)
    yield own
    own.stop()
