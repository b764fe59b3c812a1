"""A real Imprint server as a subprocess, as `imprint serve` runs it, and clients for it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import yaml

from tests.processes import OWN_GROUP, kill, lives, tree

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
SHIPPED = Path(__file__).parent.parent / "configs" / "nano.yaml"


class Server:
    """One server with its data folder. `start` and `stop` may be called again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.log = folder / "server.log"
        self.admin_key = ""
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The launcher's process ID, while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self, **overrides: str) -> None:
        """Start and wait for the ready line. `overrides` are settings, as in `GENERATOR__HOLD_AT="leased"`."""
        if self._process is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        config = yaml.safe_load(SHIPPED.read_text())
        config["http_options"]["port"] = self.port
        config["applications"][0]["args"]["data_dir"] = str(self.data_dir)
        # Taken over by another process only after this: fault tests must not wait long.
        config["applications"][0]["args"]["generator"]["lease_s"] = 5
        # A refined adapter has another ID; tests of refinement switch it on.
        config["applications"][0]["args"]["generator"]["refine"]["enabled"] = False
        config_file = self.folder / "server.yaml"
        config_file.write_text(yaml.safe_dump(config))
        environment = {**os.environ, **{f"IMPRINT_{name}": value for name, value in overrides.items()}}
        with self.log.open("ab") as log:
            offset = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.launcher", str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=SHIPPED.parent.parent,
                process_group=OWN_GROUP,
            )
        self._await_ready(offset)

    def stop(self) -> None:
        """SIGTERM, then check that it ended in order and left no process behind."""
        process, self._process = self._process, None
        if process is None:
            return
        descendants = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            kill([*descendants, psutil.Process(process.pid)])
            process.wait()
            raise AssertionError(f"the server did not stop:\n{self.output()}") from None
        orphans = [child for child in descendants if lives(child)]
        kill(orphans)
        assert not orphans, f"left behind: {orphans}\n{self.output()}"
        assert code == 0, f"exit status {code}:\n{self.output()}"

    def kill(self) -> None:
        """kill -9 of everything at once."""
        process, self._process = self._process, None
        assert process is not None
        kill(tree(process.pid))
        process.wait()

    def output(self) -> str:
        """All that the server has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def http(self, key: str, **options: Any) -> httpx.Client:
        """A client as the holder of `key` (empty: none)."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False, **options)

    def openai(self, key: str) -> openai.OpenAI:
        """The official client, without retries, so that every error shows."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx.Client(timeout=120, trust_env=False),
        )

    def create_key(self, tenant: str) -> str:
        """A new key for a tenant, through the API."""
        with self.http(self.admin_key) as client:
            response = client.post("/v1/keys", json={"tenant": tenant})
        assert response.status_code == 201, response.text
        return response.json()["secret"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        with self.http(self.admin_key) as client:
            text = client.get("/metrics").text
        samples = re.findall(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        values = [value for said, value in samples if all(label in said.split(",") for label in wanted)]
        assert values, f"no metric {name} {labels} in:\n{text}"
        return sum(float(value) for value in values)

    def _await_ready(self, offset: int) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            text = self.output()[offset:]
            key = re.search(r"imp_\w+", text)
            if key:
                self.admin_key = key.group()
            if "is ready on" in text:
                return
            if process.poll() is not None or time.monotonic() > deadline:
                if process.poll() is None:
                    self.kill()
                self._process = None
                raise AssertionError(f"the server did not start:\n{text}\n{_replica_logs(text)}")
            time.sleep(0.1)


def _replica_logs(text: str) -> str:
    """The ends of the deployments' own logs, if the launcher has said where they are."""
    found = re.search(r"^Logs: (\S+)", text, re.MULTILINE)
    if not found:
        return ""
    logs = sorted((Path(found.group(1)) / "serve").glob("*.log"))
    return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]) for log in logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
