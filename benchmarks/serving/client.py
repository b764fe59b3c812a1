"""A closed-loop load of streamed chat requests over HTTP, and what its samples say.

Every request asks for exactly `max_tokens` tokens (`ignore_eos`, temperature 0), so that servers do the same work. The
inter-token latency (ITL) is per token: the time between two arrivals of output divided by the tokens that the later
one brought, counted once for each of them. The server says with each chunk how many tokens there are so far
(`continuous_usage_stats`); servers that join chunks and those that do not are so measured alike.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

OK = "ok"
CUT = "stream ended early"


@dataclass(frozen=True)
class ChatRequest:
    """One streamed chat request. `extra` are further fields of the body, `headers` such as a tenant's name."""

    model: str
    prompt: str
    max_tokens: int
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **self.extra,
        }


@dataclass
class Sample:
    """One request. Times in seconds of `time.perf_counter`. `arrivals`: when output came and how many tokens there
    were then. `outcome`: `OK`, `CUT`, `status 503: code`, or the name of a connection error."""

    started: float
    ended: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    outcome: str = OK

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.arrivals[0][0] - self.started

    @property
    def tokens(self) -> int:
        """Tokens that came."""
        return self.arrivals[-1][1] if self.arrivals else 0


@dataclass(frozen=True)
class Load:
    """A run's samples, by time of end, and its first and last moment."""

    samples: list[Sample]
    started: float
    ended: float


def session(key: str = "") -> aiohttp.ClientSession:
    """Connections without a limit to their number, that authenticate with `key`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600), headers=headers
    )


async def stream(http: aiohttp.ClientSession, url: str, request: ChatRequest) -> Sample:
    """Send one request to the server at `url` and read its stream to the end. Raises nothing for a failed one."""
    sample = Sample(time.perf_counter())
    try:
        post = http.post(f"{url}/v1/chat/completions", json=request.body(), headers=request.headers)
        async with post as response:
            if response.status == 200:
                sample.outcome = await _read(response, sample, request.max_tokens)
            else:
                sample.outcome = f"status {response.status}: {_code(await response.read())}"
    except (aiohttp.ClientError, TimeoutError) as error:
        sample.outcome = type(error).__name__ if not sample.arrivals else CUT
    sample.ended = time.perf_counter()
    return sample


async def closed_loop(
    url: str,
    key: str,
    requests: Iterator[ChatRequest],
    concurrency: int,
    seconds: float,
    at_most: int | None = None,
    stop: asyncio.Event | None = None,
) -> Load:
    """So many clients, each with one request at a time, for `seconds`, or until `at_most` requests or `stop`.

    Those under way at the end are finished, and are among the samples.
    """
    samples: list[Sample] = []
    begun = time.perf_counter()
    sent = 0

    async def client(http: aiohttp.ClientSession) -> None:
        nonlocal sent
        while time.perf_counter() < begun + seconds and not (stop and stop.is_set()):
            if at_most is not None and sent >= at_most:
                return
            sent += 1
            sample = await stream(http, url, next(requests))
            samples.append(sample)
            if sample.outcome != OK and not sample.arrivals:
                await asyncio.sleep(0.05)  # a server that refuses at once must not be hammered

    async with session(key) as http:
        await asyncio.gather(*(client(http) for _ in range(concurrency)))
    ended = time.perf_counter()
    return Load(samples, begun, min(ended, begun + seconds))


def itl_s(sample: Sample) -> list[float]:
    """Seconds for each token after the first arrival's."""
    found: list[float] = []
    for (before, had), (at, has) in zip(sample.arrivals, sample.arrivals[1:], strict=False):
        if has > had:
            found += [(at - before) / (has - had)] * (has - had)
    return found


def percentiles_ms(seconds: Sequence[float], shares: Sequence[int] = (50, 95)) -> dict[str, float | None]:
    """{"p50": ms, …}; None where there are no values."""
    values = np.asarray(seconds, dtype=float)
    return {f"p{share}": round(1000 * float(np.percentile(values, share)), 3) if len(values) else None
            for share in shares}


def summary(load: Load) -> dict[str, Any]:
    """A row of a table: requests/s and tokens/s over the run's time, latencies of what succeeded, errors by outcome.

    Requests that ended after the run's time count neither as done nor for its tokens; their latencies count.
    """
    good = [sample for sample in load.samples if sample.outcome == OK]
    done = [sample for sample in good if sample.ended <= load.ended]
    window = load.ended - load.started
    errors = Counter(sample.outcome for sample in load.samples if sample.outcome != OK)
    return {
        "seconds": round(window, 3),
        "requests": len(done),
        "requests_per_s": round(len(done) / window, 3),
        "tokens_per_s": round(sum(sample.tokens for sample in done) / window, 1),
        "ttft_ms": percentiles_ms([sample.ttft_s for sample in good]),
        "itl_ms": percentiles_ms([value for sample in good for value in itl_s(sample)]),
        "errors": dict(sorted(errors.items())),
    }


def errors_cell(errors: Mapping[str, int]) -> str:
    """A summary's errors for a table."""
    return ", ".join(f"{count} {outcome}" for outcome, count in errors.items()) or "0"


def completions(load: Load) -> list[float]:
    """When requests ended well, in seconds since the run's begin, in order."""
    return sorted(sample.ended - load.started for sample in load.samples if sample.outcome == OK)


def rate(times: Sequence[float], begin: float, end: float) -> float:
    """How many of the times, per second, are in [begin, end)."""
    return sum(begin <= at < end for at in times) / (end - begin)


@dataclass(frozen=True)
class Recovery:
    """`after_s`: from the fault until `window_s` seconds begin with enough completions; 0 when there were always
    enough, None when there never were again. `lowest`: the lowest rate of such seconds after the fault."""

    after_s: float | None
    lowest: float


def recovery(
    times: Sequence[float], fault: float, end: float, before: float, share: float = 0.8, window_s: float = 5.0,
    step_s: float = 0.5,
) -> Recovery:
    """How throughput came back after a fault at `fault`, where `before` was the rate (1/s) until then.

    It is back from the first moment after its first fall below `share` of `before`. Raises ValueError when less than
    `window_s` follow the fault.
    """
    starts = np.arange(fault, end - window_s + 1e-9, step_s)
    if not len(starts):
        raise ValueError(f"{end - fault:g} s after the fault are less than a window of {window_s:g} s")
    rates = [rate(times, float(start), float(start) + window_s) for start in starts]
    fell = next((i for i, value in enumerate(rates) if value < share * before), None)
    if fell is None:
        return Recovery(0.0, min(rates))
    back = next((i for i in range(fell, len(rates)) if rates[i] >= share * before), None)
    return Recovery(None if back is None else float(starts[back]) - fault, min(rates))


async def _read(response: aiohttp.ClientResponse, sample: Sample, max_tokens: int) -> str:
    """Notes arrivals; gives the outcome."""
    rest, finished, failed = b"", False, False
    async for data in response.content.iter_any():
        now = time.perf_counter()
        *events, rest = (rest + data).split(b"\n\n")
        tokens = sample.tokens
        for event in events:
            text = event.removeprefix(b"data: ")
            if text == b"[DONE]":
                finished = True
                continue
            chunk = json.loads(text)
            failed = failed or "error" in chunk
            tokens = max(tokens, (chunk.get("usage") or {}).get("completion_tokens") or 0)
        if tokens > sample.tokens:
            sample.arrivals.append((now, tokens))
    if failed or not finished:
        return CUT
    return OK if sample.tokens == max_tokens else f"{sample.tokens} tokens in place of {max_tokens}"


def _code(body: bytes) -> str:
    """What an error answer calls itself."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "no error object"
