"""Half an hour of mixed load leaves memory and file descriptors flat.

IMPRINT_SOAK_S: for how many seconds (1800). IMPRINT_SOAK_JSON: a file for the measured series.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hypernet.training.corpus.documents import ask, sample_document
from tests.e2e.conftest import Tenant, make_tenant
from tests.e2e.resources import TOTAL, ProcessSeries, evaluate, measured, table
from tests.server import Server

WORKERS = 4
KEPT = 5
"""Documents that each worker keeps at most, so that what the server must remember stays the same."""
WARM_UP = 0.3
"""Share of the time before memory is judged."""
BURST, BURST_REQUESTS = 32, 4
"""Clients at once in the beginning, and requests of each kind by each."""


class Worker:
    """One client, with a tenant of its own, that does one thing after another."""

    def __init__(self, server: Server, number: int) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._tenant: Tenant = make_tenant(server, f"soak-{number}")
        self._rng = Random(f"soak-{number}")
        self._documents: list[str] = []
        self._question = "Who?"
        self._deeds: list[tuple[Callable[[], None], int]] = [
            (self._post, 10), (self._update, 6), (self._roll_back, 4), (self._delete, 4), (self._routed, 30),
            (self._pinned, 16), (self._streamed, 16), (self._cancelled, 8), (self._base, 6), (self._look, 4),
        ]  # fmt: skip

    def run(self, until: float) -> None:
        """Until then (`time.monotonic`), or the first ten errors."""
        while time.monotonic() < until and len(self.errors) < 10:
            (deed,) = self._rng.choices([deed for deed, _ in self._deeds], [weight for _, weight in self._deeds])
            try:
                deed()
                self.counts[deed.__name__.strip("_")] += 1
            except Exception as error:
                self.errors.append(f"{deed.__name__}: {error!r}")
        self._tenant.http.close()
        self._tenant.openai.close()

    def burst(self) -> None:
        """What a crowd of clients does at the same moment."""
        for _ in range(BURST_REQUESTS):
            self._routed()
            self._look()

    def _text(self) -> str:
        document = sample_document(self._rng, self._rng.randint(1, 4))
        self._question = ask(document.facts[0], document, self._rng).text
        return document.text

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._tenant.http.request(method, path, **arguments)
        assert response.status_code == 200, f"{response.status_code} {response.text[:300]}"
        return response.json()

    def _post(self) -> None:
        if len(self._documents) >= KEPT:
            self._delete()
        # Words of the worker's own, so that no two posts are the same document.
        text = f"{self._text()}\n\nNote {self.counts['post']}."
        body = self._call("POST", "/v1/documents?wait=60", json={"text": text})
        assert body["status"] in ("ready", "degraded"), body
        self._documents.append(body["id"])

    def _update(self) -> None:
        if self._documents:
            path = f"/v1/documents/{self._rng.choice(self._documents)}?wait=60"
            assert self._call("PUT", path, json={"text": self._text()})["status"] in ("ready", "degraded")

    def _roll_back(self) -> None:
        if self._documents:
            path = f"/v1/documents/{self._rng.choice(self._documents)}"
            assert self._call("POST", f"{path}/rollback", json={"version": 1})["current_version"] == 1

    def _delete(self) -> None:
        if len(self._documents) > 1:
            self._call("DELETE", f"/v1/documents/{self._documents.pop(0)}")

    def _look(self) -> None:
        for path in ("/v1/documents", "/v1/adapters", "/v1/models"):
            self._call("GET", path)

    def _body(self, model: str, **more: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": self._question}], "max_tokens": 16, **more}

    def _model(self) -> str:
        return self._rng.choice(self._documents) if self._documents else "base"

    def _routed(self) -> None:
        self._call("POST", "/v1/chat/completions", json=self._body("imprint"))

    def _pinned(self) -> None:
        self._call("POST", "/v1/chat/completions", json=self._body(self._model(), temperature=0))

    def _base(self) -> None:
        self._call("POST", "/v1/chat/completions", json=self._body("base"))

    def _streamed(self) -> None:
        with self._tenant.http.stream(
            "POST", "/v1/chat/completions", json=self._body("imprint", stream=True)
        ) as response:
            text = response.read().decode()
        assert response.status_code == 200 and text.rstrip().endswith("data: [DONE]"), text[-300:]

    def _cancelled(self) -> None:
        body = self._body(self._model(), stream=True, ignore_eos=True) | {"max_tokens": 800}
        with self._tenant.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            next(response.iter_lines())


@pytest.mark.e2e
@pytest.mark.own_server
@pytest.mark.long
@pytest.mark.timeout(0)
def test_memory_and_file_descriptors_stay_flat(own_server: Server) -> None:
    seconds = float(os.environ.get("IMPRINT_SOAK_S", "1800"))
    # A small cache of questions is full before memory is judged.
    own_server.start(GENERATOR__REFINE__ENABLED="true", ROUTER__CACHED_TEXTS="200")
    workers = [Worker(own_server, number) for number in range(WORKERS)]
    # Nor do pools of threads and of connections to the registry grow once as many were at work at once.
    with ThreadPoolExecutor(BURST) as pool:
        list(pool.map(lambda number: workers[number % WORKERS].burst(), range(BURST)))
    with measured(own_server.pid, every_s=max(1.0, seconds / 360)) as series:
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=worker.run, args=(until,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = sum((worker.counts for worker in workers), Counter[str]())
    errors = [error for worker in workers for error in worker.errors]
    trends = evaluate(series, WARM_UP * seconds)
    print(f"\n{seconds:g} s, {sum(counts.values())} requests: {dict(counts)}\n{table(trends)}")
    if target := os.environ.get("IMPRINT_SOAK_JSON"):
        found = {"seconds": seconds, "warm_up_s": WARM_UP * seconds, "counts": counts, "errors": errors,
                 "trends": [{**asdict(one), "flat": one.flat} for one in trends],
                 "series": [asdict(one) for one in series]}  # fmt: skip
        Path(target).write_text(json.dumps(found))
    assert errors == []
    assert all(counts[name] > 0 for name in ("post", "update", "delete", "routed", "streamed", "cancelled")), counts
    assert [one for one in trends if not one.flat] == []
    # Idle again: nothing is left running for clients that went away.
    deadline = time.monotonic() + 30
    while own_server.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline, "still generating"
        time.sleep(0.5)


def made_up(leak_mib_a_minute: float = 0.0, fds_a_minute: float = 0.0, step_mib: float = 0.0) -> list[ProcessSeries]:
    """Half an hour of a large and a small process: noise, a sawtooth as of a garbage collector, growth while warming
    up, and in the large one what the arguments say."""
    rng = Random(7)
    large, small = ProcessSeries("large", 1), ProcessSeries("small", 2)
    for number in range(360):
        at = 5.0 * number
        warm = 150.0 * (1 - math.exp(-at / 120))
        saw = 6.0 * ((at / 47) % 1)
        leak = leak_mib_a_minute * at / 60 + (step_mib if at > 1100 else 0.0)
        large.add(at, 500 + warm + saw + leak + rng.gauss(0, 2), 80 + rng.randint(0, 4) + int(fds_a_minute * at / 60))
        small.add(at, 60 + rng.gauss(0, 0.5), 12)
    return [large, small]


def not_flat(series: list[ProcessSeries]) -> list[tuple[str, str]]:
    return [(one.label, one.resource) for one in evaluate(series, 540) if not one.flat]


def test_noise_and_warming_up_are_no_leak() -> None:
    assert not_flat(made_up()) == []
    assert not_flat(made_up(step_mib=8)) == [], "an allocation that came late, once"
    assert {one.label for one in evaluate(made_up(), 540)} == {TOTAL, "large (1)", "small (2)"}


@pytest.mark.parametrize("rate", [1.5, 4.0])
def test_a_leak_is_flagged(rate: float) -> None:
    # At ten requests a second 1.5 MiB a minute are 2.6 KiB a request.
    assert not_flat(made_up(leak_mib_a_minute=rate)) == [(TOTAL, "memory_mib"), ("large (1)", "memory_mib")]


def test_leaked_file_descriptors_are_flagged() -> None:
    assert not_flat(made_up(fds_a_minute=0.5)) == [(TOTAL, "fds"), ("large (1)", "fds")]


def test_a_leak_shows_in_the_sum_when_its_process_is_replaced() -> None:
    first, second, other = ProcessSeries("worker", 1), ProcessSeries("worker", 2), ProcessSeries("other", 3)
    for number in range(360):
        (first if number < 230 else second).add(5.0 * number, 100 + 0.1 * number, 10)
        other.add(5.0 * number, 50, 10)
    assert not_flat([first, second, other]) == [(TOTAL, "memory_mib")]


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="too few"):
        evaluate(made_up(), 1799)


def test_processes_are_measured() -> None:
    with measured(os.getpid(), every_s=0.02) as series:
        block = bytearray(os.urandom(64 * 2**20))
        time.sleep(0.2)
    assert len(block) == 64 * 2**20
    mine = next(one for one in series if one.pid == os.getpid())
    assert len(mine.times_s) == len(mine.memory_mib) == len(mine.fds) >= 3
    assert max(mine.memory_mib) > 64 and min(mine.fds) >= 3
