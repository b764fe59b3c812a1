"""vLLM's own OpenAI server as a peer: the same engine arguments and the same adapter folders, without Imprint."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from hypernet.nano import base_dir

# As configs/nano.yaml has them, by vLLM's option names.
ENGINE = {"max-loras": "8", "max-lora-rank": "64", "max-cpu-loras": "64", "max-model-len": "2048", "dtype": "float32",
          "block-size": "32", "max-num-seqs": "64"}


# Of every peer: no download, no statistics, and none of Imprint's plugins.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}


class PeerServer:
    """A server process that listens on loopback and ends with all its children."""

    def __init__(self, command: list[str], environment: Mapping[str, str], port: int, log: Path, health: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log, self._health = log, health
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file,
                                            stderr=subprocess.STDOUT)

    async def ready(self) -> None:
        """Wait until it serves; raises RuntimeError with its last lines where it ends first."""
        async with httpx.AsyncClient(base_url=self.url) as client:
            for _ in range(600):
                if self.process.poll() is not None:
                    raise RuntimeError(f"the peer ended: {self._log.read_text()[-3000:]}")
                with suppress(httpx.TransportError):
                    if (await client.get(self._health)).status_code == httpx.codes.OK:
                        return
                await asyncio.sleep(0.5)
        raise RuntimeError("the peer was not ready in 300 s")

    def stop(self) -> None:
        """End it and its engine."""
        processes = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        self.process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()


class VllmServer(PeerServer):
    """What `vllm serve --enable-lora` runs, with the given adapter folders by name.

    ``wrapper``: load Imprint's LoRA code for CPUs into it; nothing else of Imprint.
    """

    def __init__(self, adapters: Mapping[str, Path], port: int, log: Path, wrapper: bool = False) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base_dir()),
                   "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enable-lora"]
        for name, value in ENGINE.items():
            command += [f"--{name}", value]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
        environment = dict(ENVIRONMENT)
        if wrapper:
            del environment["VLLM_PLUGINS"]  # vLLM then loads all that are installed
        super().__init__(command, environment, port, log, "/health")
