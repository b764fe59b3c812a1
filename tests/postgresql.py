"""A PostgreSQL server for tests: its own data folder, a Unix socket in a private folder, no TCP port."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg

from tests.processes import OWN_GROUP, kill, tree

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
SUPERUSER = "imprint"
SETTINGS = {
    "listen_addresses": "",
    # Tests kill processes, not the machine: what has reached the kernel is kept.
    "fsync": "off",
    # Deadlocks are made on purpose here, and resolved only after this time.
    "deadlock_timeout": "200ms",
    "log_line_prefix": "%m [%p] ",
}


class Cluster:
    """One server. `start` and `stop` may be called again and again; `remove` ends it for good.

    The collation is English, not byte order, as it is on most real servers; that takes PostgreSQL 15 or later.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="imprint-pg-"))  # short: socket paths end at 107 bytes
        self._data = self.folder / "data"
        self._log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        uid, gid = _account()
        os.chown(self.folder, uid, gid)
        self._run("initdb", "--pgdata", self._data, "--username", SUPERUSER, "--auth", "trust", "--encoding", "UTF8",
                  "--locale", "C.UTF-8", "--locale-provider", "icu", "--icu-locale", "en-US", "--no-sync",
                  "--no-instructions")  # fmt: skip

    def start(self) -> None:
        """Start and wait until it takes connections."""
        settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", str(self._data), "-k", str(self.folder), *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                process_group=OWN_GROUP,
                **_as_account(),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise AssertionError(f"PostgreSQL did not start:\n{self._log.read_text()}") from error
            time.sleep(0.05)

    def stop(self) -> None:
        """End it in order, without waiting for clients."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGINT)  # PostgreSQL's "fast" shutdown
            process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """kill -9 of all its processes at once, as at a crash."""
        process, self._process = self._process, None
        if process is None:
            return
        kill(tree(process.pid), STOP_TIMEOUT_S)
        process.wait(STOP_TIMEOUT_S)

    def remove(self) -> None:
        """Stop and delete everything."""
        self.stop()
        shutil.rmtree(self.folder)

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """Run one statement outside of the tests' databases and return its rows, if it has any."""
        with psycopg.connect(
            host=str(self.folder), user=SUPERUSER, dbname="postgres", autocommit=True, connect_timeout=10
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new, empty database, which is dropped in the end whoever still uses it."""
        self._made += 1
        name = f"test_{self._made}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield f"postgresql+psycopg://{SUPERUSER}@/{name}?host={quote(str(self.folder), safe='')}"
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _run(self, program: str, *arguments: object) -> None:
        done = subprocess.run(
            [_program(program), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.folder,
            **_as_account(),
        )
        assert done.returncode == 0, f"{program}: {done.stdout}\n{done.stderr}"


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A new cluster, started; removed in the end."""
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@functools.cache
def _program(name: str) -> str:
    """A server program, from the places where scripts/install-system-packages looks."""
    chosen = os.environ.get("POSTGRESQL_BIN")
    folders = [chosen] if chosen else map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:])
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ["PATH"]]))
    assert found, f"PostgreSQL's {name} is not here; `make test-system` installs it"
    return found


def _account() -> tuple[int, int]:
    """User and group that the server runs as: ours, but PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    account = pwd.getpwnam("postgres")
    return account.pw_uid, account.pw_gid


def _as_account() -> dict[str, object]:
    if os.geteuid() != 0:
        return {}
    uid, gid = _account()
    return {"user": uid, "group": gid, "extra_groups": []}
