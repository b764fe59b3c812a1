"""Table 4: the way to the first token, from a document's POST and from each tier (`measure`, `report`).

The server is idle but for one request at a time. With few slots and few places in vLLM's memory, adapters reach every
tier by use alone: each one sampled is asked for when nobody ever has (its files are in the blob store only), at once
again, after as many others as there are slots, and after as many as vLLM's memory holds. A sample counts for the tier
that `GET /v1/slots` shows right before the request. The base's first token, in turn with the others, is the zero line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.server import machine
from benchmarks.serving.client import OK, ChatRequest, percentiles_ms, session, stream
from benchmarks.serving.registered import Registered, RegisteredAdapter, register
from tests.server import Server

SAMPLES, SLOTS, CPU_LORAS = 30, 4, 8
MAX_TOKENS = 4
BASE, POSTED, READY, AFTER_READY = "base", "posted", "post to ready", "ready to first token"
TITLES = {
    BASE: "the base, no adapter",
    "slot": "resident in a slot",
    "cpu": "in vLLM's memory, without a slot",
    "disk": "on the node's disk",
    "blobs": "cold: in the blob store only",
    POSTED: "POST of a document to its first token",
    READY: "... of that until it is ready",
    AFTER_READY: "... from then to the first token",
}


async def measure(folder: Path, samples: int = SAMPLES, slots: int = SLOTS, cpu_loras: int = CPU_LORAS) -> dict:
    """Times to the first token in milliseconds, by way. Starts a server of its own in `folder`."""
    others = slots + cpu_loras
    registered = register(folder / "data", samples + others, tenants=2)
    server = Server(folder)
    server.start(ENGINE__MAX_LORAS=str(slots), ENGINE__MAX_CPU_LORAS=str(cpu_loras))
    try:
        async with session(registered.service_key) as http, session(registered.admin_key) as admin:
            idle = _IdleServer(server.url, http, admin)
            await idle.tiers(registered, samples, slots, cpu_loras)
            tenant = registered.adapters[0]
            for number in range(samples):
                await idle.post(number, tenant)
    finally:
        server.stop()
    return {
        "machine": machine(),
        "slots": slots,
        "cpu_loras": cpu_loras,
        "rows": {name: {"samples": len(found), **percentiles_ms(found)} for name, found in idle.seconds.items()},
    }


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"Machine: {result['machine']}. Model: nano, float32.",
        f"The first token on an idle server with {result['slots']} slots and {result['cpu_loras']} adapters in vLLM's "
        "memory, milliseconds. A posted document goes through the quality gate; its request is sent as soon as the "
        "waiting POST says that it is ready.",
        "",
        "| the adapter is | samples | p50 | p95 | p50 above the base |",
        "|---|---|---|---|---|",
    ]
    rows = result["rows"]
    for name, title in TITLES.items():
        row = rows[name]
        if not row["samples"]:
            lines.append(f"| {title} | 0 | - | - | - |")
            continue
        above = "-" if name in (BASE, READY) else f"{row['p50'] - rows[BASE]['p50']:+.1f}"
        lines.append(f"| {title} | {row['samples']} | {row['p50']:.1f} | {row['p95']:.1f} | {above} |")
    return "\n".join(lines) + "\n"


class _IdleServer:
    """Sends one request at a time and keeps the seconds to its first token."""

    def __init__(self, url: str, http: aiohttp.ClientSession, admin: aiohttp.ClientSession) -> None:
        self._url, self._http, self._admin = url, http, admin
        self._numbers = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in TITLES}

    async def tiers(self, registered: Registered, samples: int, slots: int, cpu_loras: int) -> None:
        """Samples of each of the first `samples` adapters in each tier; the others push them out."""
        sampled, others = registered.adapters[:samples], registered.adapters[samples:]
        for adapter in others:  # the first requests of a server, too, which warm it up
            await self._first_token(adapter.id, adapter)
        pushing = _in_turn(others)
        for adapter in sampled:
            for push in (0, 0, slots, cpu_loras):
                for _ in range(push):
                    other = next(pushing)
                    await self._first_token(other.id, other)
                tier = await self._tier(adapter.id)
                self.seconds[tier].append(await self._first_token(adapter.id, adapter))
            self.seconds[BASE].append(await self._first_token(BASE, adapter))

    async def post(self, number: int, tenant: RegisteredAdapter) -> None:
        """Post a new document and ask it."""
        text = f"The Harrow Lane depot {number} opens at {6 + number % 6}:{10 + number}. Its warden is Ada Quill."
        started = time.perf_counter()
        post = self._http.post(f"{self._url}/v1/documents?wait=60", json={"title": f"Harrow {number}", "text": text},
                               headers=tenant.headers)
        async with post as response:
            response.raise_for_status()
            document = await response.json()
        ready = time.perf_counter() - started
        if document["status"] not in ("ready", "degraded"):
            raise RuntimeError(f"{document['id']} is {document['status']} after {ready:.0f} s")
        first = await self._first_token(document["id"], tenant)
        self.seconds[READY].append(ready)
        self.seconds[AFTER_READY].append(first)
        self.seconds[POSTED].append(ready + first)

    async def _first_token(self, model: str, tenant: RegisteredAdapter) -> float:
        self._numbers += 1
        # The number first, so that no prefix cache has it.
        request = ChatRequest(model, f"{self._numbers}: when does the depot open?", MAX_TOKENS, tenant.headers)
        sample = await stream(self._http, self._url, request)
        if sample.outcome != OK:
            raise RuntimeError(f"a request for {model} failed: {sample.outcome}")
        return sample.ttft_s

    async def _tier(self, adapter_id: str) -> str:
        async with self._admin.get(f"{self._url}/v1/slots") as response:
            response.raise_for_status()
            (replica,) = (await response.json())["data"]
        tiers = {row["adapter_id"]: str(row["tier"]) for row in replica["adapters"]}
        return tiers.get(adapter_id, "blobs")


def _in_turn(adapters: list[RegisteredAdapter]) -> Iterator[RegisteredAdapter]:
    while True:
        yield from adapters
