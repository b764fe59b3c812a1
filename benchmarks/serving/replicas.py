"""Table 5: two engine replicas beside one, and the death of one of two under load (`measure`, `report`).

Traffic names adapters in turn, as many as there are slots. The killed process is vLLM's engine core, by SIGKILL; the
clients go on in a closed loop and send nothing twice. Recovery is when the rate of completed requests is back at
`SHARE` of what it was before, in windows of five seconds; the new replica is there when it answers `GET /v1/slots`
(its engine runs then), and serves with its first request for an adapter.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.server import machine
from benchmarks.serving.client import (
    CUT,
    OK,
    ChatRequest,
    Load,
    closed_loop,
    completions,
    errors_cell,
    rate,
    recovery,
    session,
    summary,
)
from benchmarks.serving.registered import Registered, register
from tests.processes import tree
from tests.server import Server

ADAPTERS, MAX_TOKENS = 8, 32
CONCURRENCIES = (8, 32)
SHARE, WINDOW_S = 0.8, 5.0
LIMIT_S = 240.0  # for the new replica to serve
LOST = "was lost with its engine replica"  # in the ingress' log, once for each attempt


async def measure(
    folder: Path,
    concurrencies: Sequence[int] = CONCURRENCIES,
    seconds: float = 60.0,
    warm_up_s: float = 10.0,
    before_s: float = 30.0,
    after_s: float = 30.0,
    kill_concurrency: int = 32,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Both halves of the table. `before_s`: load before the kill; `after_s`: after the new replica serves."""
    registered = register(folder / "data", ADAPTERS, tenants=ADAPTERS)
    rows, killed = [], {}
    for replicas in (1, 2):
        server = Server(folder)
        with _logs_written_at_once():
            server.start(ENGINE__NUM_REPLICAS=str(replicas))
        try:
            requests = _in_turn(registered, max_tokens)
            for concurrency in concurrencies:
                await closed_loop(server.url, registered.service_key, requests, concurrency, warm_up_s)
                load = await closed_loop(server.url, registered.service_key, requests, concurrency, seconds)
                rows.append({"replicas": replicas, "concurrency": concurrency, **summary(load)})
            if replicas == 2:
                killed = await _kill(server, registered, requests, kill_concurrency, before_s, after_s)
        finally:
            server.stop()
    return {"machine": machine(), "seconds": seconds, "max_tokens": max_tokens, "rows": rows, "killed": killed}


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    ones = {row["concurrency"]: row["requests_per_s"] for row in result["rows"] if row["replicas"] == 1}
    lines = [
        f"Machine: {result['machine']}. Model: nano, float32. The replicas divide the machine's cores: where one keeps "
        f"all of them busy, a second one cannot add throughput. {ADAPTERS} adapters in turn, {result['max_tokens']} "
        f"tokens, {result['seconds']:g} s a row.",
        "",
        "| replicas | clients | requests/s | to one replica | TTFT p50 / p95 ms | ITL p50 / p95 ms | errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        one = ones[row["concurrency"]]
        ttft, itl = ([f"{found[p] or 0:.1f}" for p in ("p50", "p95")] for found in (row["ttft_ms"], row["itl_ms"]))
        lines.append(f"| {row['replicas']} | {row['concurrency']} | {row['requests_per_s']:.2f} | "
                     f"{row['requests_per_s'] / one if one else 0:.2f} | {' / '.join(ttft)} | {' / '.join(itl)} | "
                     f"{errors_cell(row['errors'])} |")
    killed = result["killed"]
    lines += [
        "",
        f"One of two replicas' vLLM killed under {killed['concurrency']} clients:",
        "",
        "| | |",
        "|---|---|",
        f"| requests and what clients saw | {errors_cell(killed['outcomes'])} |",
        f"| attempts lost before the first output and made again, unseen | {killed['retried']} |",
        f"| requests/s before; lowest in {WINDOW_S:g} s after | {killed['before_per_s']:.2f}; "
        f"{killed['lowest_per_s']:.2f} |",
        f"| throughput back at {SHARE:.0%} after | {_seconds(killed['recovered_s'])} |",
        f"| new replica's engine runs after | {_seconds(killed['answers_s'])} |",
        f"| new replica serves after | {_seconds(killed['serves_s'])} |",
    ]
    return "\n".join(lines) + "\n"


async def _kill(
    server: Server, registered: Registered, requests: Iterator[ChatRequest], concurrency: int, before_s: float,
    after_s: float,
) -> dict[str, Any]:
    """SIGKILL to one engine core, with load from `before_s` before until `after_s` after its successor serves."""
    stop = asyncio.Event()
    limit_s = before_s + LIMIT_S + after_s
    retried = _log_lines(server, LOST)
    async with session(registered.admin_key) as admin:
        old = {replica["replica"] for replica in await _replicas(admin, server.url)}
        running = asyncio.create_task(
            closed_loop(server.url, registered.service_key, requests, concurrency, limit_s, stop=stop)
        )
        try:
            await asyncio.sleep(before_s)
            victim = _cores(server)[0]
            victim.kill()
            fault = time.perf_counter()
            answers_s, serves_s = await _successor(admin, server.url, old, fault)
            await asyncio.sleep(after_s)
        finally:
            stop.set()
            load = await running
    ended = time.perf_counter()
    return {
        "concurrency": concurrency,
        "answers_s": answers_s,
        "serves_s": serves_s,
        "retried": _log_lines(server, LOST) - retried,
        **timeline(load, fault, min(ended, load.ended)),
    }


def timeline(load: Load, fault: float, ended: float) -> dict[str, Any]:
    """What a run says about a fault at the moment `fault` (of `time.perf_counter`), until `ended`."""
    times, at, end = completions(load), fault - load.started, ended - load.started
    before = rate(times, min(WINDOW_S, at / 2), at)
    found = recovery(times, at, end, before, SHARE, WINDOW_S)
    return {
        "outcomes": dict(Counter(sample.outcome for sample in load.samples).most_common()),
        "cut": sum(sample.outcome == CUT for sample in load.samples),
        "ok": sum(sample.outcome == OK for sample in load.samples),
        "before_per_s": before,
        "lowest_per_s": found.lowest,
        "recovered_s": found.after_s,
        "fault_s": at,
        "per_s": [rate(times, second, second + 1) for second in range(int(end))],
    }


async def _successor(
    admin: aiohttp.ClientSession, url: str, old: set[str], fault: float
) -> tuple[float | None, float | None]:
    """Seconds from the fault until a replica that was not among the `old` answers, and until it serves."""
    answers: float | None = None
    while time.perf_counter() < fault + LIMIT_S:
        for replica in await _replicas(admin, url):
            if replica["replica"] in old:
                continue
            now = time.perf_counter() - fault
            answers = answers if answers is not None else now
            if any(row["uses"] for row in replica["adapters"]):
                return answers, now
        await asyncio.sleep(0.5)
    return answers, None


async def _replicas(admin: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    """The replicas that answer; none while the question itself fails."""
    with suppress(aiohttp.ClientError, TimeoutError):
        async with admin.get(f"{url}/v1/slots", timeout=aiohttp.ClientTimeout(total=10)) as response:
            if response.status == 200:
                return list((await response.json())["data"])
    return []


@contextmanager
def _logs_written_at_once() -> Iterator[None]:
    """A server started meanwhile buffers no log records, so that they can be counted while it runs."""
    name = "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _cores(server: Server) -> list[psutil.Process]:
    """The processes of the server in which vLLM's engines run."""
    found = []
    for process in tree(server.pid):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("VLLM::EngineCore"):
                found.append(process)
    return found


def _log_lines(server: Server, text: str) -> int:
    """How many lines of the deployments' logs contain the text."""
    folders = re.findall(r"^Logs: (\S+)", server.output(), re.MULTILINE)
    if not folders:
        raise RuntimeError("the server has not said where its logs are")
    logs = (Path(folders[-1]) / "serve").glob("*ingress*.log")
    return sum(text in line for log in logs for line in log.read_text(errors="replace").splitlines())


def _in_turn(registered: Registered, max_tokens: int) -> Iterator[ChatRequest]:
    for number, adapter in enumerate(itertools.cycle(registered.adapters)):
        yield ChatRequest(adapter.id, f"{number}: who is the warden of the depot?", max_tokens, adapter.headers)


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"
