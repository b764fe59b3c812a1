"""Ray nodes for tests, started as an operator starts them: `ray start`, then `serve run` with a config file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.processes import OWN_GROUP, kill, tree

ROOT = Path(__file__).parent.parent
# All of Ray's ports on loopback, as `imprint serve` has it.
ONE_NODE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
START_TIMEOUT_S = 90.0
DEPLOY_TIMEOUT_S = 300.0
_PROGRAMS = Path(sys.executable).parent
_STATUS = """
import json, ray
from ray import serve
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
status = serve.status()
nodes = sum(bool(node["Alive"]) for node in ray.nodes())
print("STATUS", json.dumps({"nodes": nodes, "proxies": len(status.proxies), "applications": {
    name: {"status": app.status, "message": app.message, "deployments": {
        part: {state: count for state, count in deployment.replica_states.items() if count}
        for part, deployment in app.deployments.items()}}
    for name, app in status.applications.items()}}))
"""


class RayNode:
    """One node. `before` is a command that everything on the node runs through, such as one that enters a network
    namespace; `environment` is what the node's processes have beside this process's."""

    def __init__(
        self,
        address: str = "127.0.0.1",
        head: RayNode | None = None,
        before: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        self._head = head
        self._before = before
        self._port: int = head._port if head else free_port()
        self._token: str = head._token if head else secrets.token_hex(16)
        # Short: the paths of Ray's sockets end at 107 bytes.
        self._folder: Path = head._folder if head else Path(tempfile.mkdtemp(prefix="imprint-ray-"))
        self._log = self._folder / f"{address}.log"
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": f"{(head or self).address}:{self._port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is part of the cluster."""
        head = ["--head", "--port", str(self._port)]
        role = ["--address", f"{self._head.address}:{self._port}"] if self._head else head
        options = ["--block", "--node-ip-address", self.address, "--num-cpus", "2", "--object-store-memory", str(2**27)]
        if not self._head:
            options += ["--include-dashboard", "false", "--temp-dir", str(self._folder / "ray")]
        environment = {name: value for name, value in self._environment.items() if name != "RAY_ADDRESS"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._before, str(_PROGRAMS / "ray"), "start", *role, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                process_group=OWN_GROUP,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in self.output():
            assert self._process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.2)

    def deploy(self, config: Mapping[str, Any]) -> None:
        """`serve run` of a config on this node's cluster, without waiting for the application."""
        file = self._folder / "serve.json"  # JSON is YAML
        file.write_text(json.dumps(config))
        self.run(str(_PROGRAMS / "serve"), "run", "--non-blocking", str(file))

    def await_running(self, name: str = "imprint", **replicas: int) -> dict[str, Any]:
        """Wait until the application runs with these numbers of replicas and no others are starting or stopping; the
        deployments' replicas by state."""
        deadline = time.monotonic() + DEPLOY_TIMEOUT_S
        while True:
            status = self.status()
            app = status["applications"].get(name, {"status": "", "deployments": {}})
            parts = app["deployments"]
            wanted = all(parts[part] == {"RUNNING": count} for part, count in replicas.items() if part in parts)
            if app["status"] == "RUNNING" and wanted:
                return parts
            assert time.monotonic() < deadline and app["status"] != "DEPLOY_FAILED", f"{status}\n{self.logs()}"
            time.sleep(1)

    def status(self) -> dict[str, Any]:
        """What Ray and Serve's controller say: {"nodes", "proxies", "applications": {name: {"status", "deployments":
        {name: {state: replicas}}}}}."""
        output = self.run(sys.executable, "-c", _STATUS)
        return json.loads(output.split("STATUS ", 1)[1].splitlines()[0])

    def run(self, *command: str, timeout_s: float = 120) -> str:
        """A command on this node; its output."""
        done = subprocess.run(
            [*self._before, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
            cwd=ROOT,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that `ray start` has started here, directly or not."""
        return tree(self._process.pid) if self._process else []

    def kill(self) -> None:
        """kill -9 of all the node's processes at once."""
        process, self._process = self._process, None
        if process is not None:
            kill(tree(process.pid), 30)
            process.wait()

    def remove(self) -> None:
        """Kill it; with the head also the logs go."""
        self.kill()
        if self._head is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def output(self) -> str:
        """What `ray start` has printed."""
        return self._log.read_text(errors="replace")

    def logs(self) -> str:
        """The ends of the logs of Serve's replicas and controller."""
        logs = sorted(self._folder.glob("ray/session_latest/logs/serve/*.log"))
        ends = {log.name: "\n".join(log.read_text(errors="replace").splitlines()[-25:]) for log in logs}
        return "\n".join(f"== {name}\n{end}" for name, end in ends.items())


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
