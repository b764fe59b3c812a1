"""Hosts for tests: network namespaces on this machine, joined by a bridge. Needs root and `ip`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Host:
    """A network namespace with an address of its own; this machine's file system and processes."""

    name: str
    address: str

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command that is to run on this host."""
        return ("ip", "netns", "exec", self.name)

    def processes(self) -> list[psutil.Process]:
        """All that run on this host."""
        found = []
        for pid in _ip("netns", "pids", self.name).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Hosts that reach each other and this process, and nothing else."""
    tag = f"{os.getpid() % 0xFFFF:04x}"
    bridge, subnet = f"impbr{tag}", f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    made: list[Host] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{subnet}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            host = Host(f"imprint-{tag}-{number}", f"{subnet}.{number}")
            inner, outer = f"impin{tag}{number}", f"impout{tag}{number}"
            _ip("netns", "add", host.name)
            made.append(host)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", host.name)
            _ip("link", "set", outer, "master", bridge)
            _ip("link", "set", outer, "up")
            for command in (("link", "set", "lo", "up"), ("link", "set", inner, "up"),
                            ("address", "add", f"{host.address}/24", "dev", inner)):  # fmt: skip
                _ip("-n", host.name, *command)
        yield made
    finally:
        for host in made:
            _ip("netns", "delete", host.name)
        _ip("link", "delete", bridge)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
