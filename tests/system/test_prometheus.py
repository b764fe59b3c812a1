"""A real Prometheus scrapes the API's `/metrics`, and the queries that operators make give the right numbers.

The API is the real one on a real port; engine and router are scripted, so that every number is known beforehand.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serve.api.application import create_app
from serve.metrics import CONTENT_TYPE, GeneratorMetrics
from tests.serve.api_helpers import Api, IdleGenerator, make_api

pytestmark = pytest.mark.system

SCRAPE = "500ms"
TIMEOUT_S = 60.0
FIRST, SECOND = 1, 6  # how often everything is done before Prometheus has looked, and after
MESSAGES = [{"role": "user", "content": "When does the pool open?"}]
NO_MATCH = {"adapter_id": None, "document_id": None, "reason": "no_candidates", "score": None}
MATCH = {"adapter_id": "adp_1", "document_id": "doc_1", "reason": "matched", "score": 0.425}


class Generator(IdleGenerator):
    """A generator with the real metrics, which tests count up."""

    def __init__(self) -> None:
        self.numbers = GeneratorMetrics()

    async def metrics(self) -> str:
        return self.numbers.text()


@dataclasses.dataclass
class Imprint:
    """The API on a port of its own."""

    api: Api
    generator: Generator
    address: str

    def client(self, key: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=f"http://{self.address}", headers=headers, timeout=60, trust_env=False)

    def page(self) -> httpx.Response:
        """`/metrics` as an operator reads it."""
        with self.client(self.api.admin_key) as client:
            return client.get("/metrics")

    def use(self, times: int) -> None:
        """Do everything that is counted, so many times."""
        with self.client(self.api.key) as client:
            for _ in range(times):
                document = {"title": "Pool hours", "text": f"{time.monotonic_ns()}"}
                for _ in range(2):
                    assert client.post("/v1/documents", json=document).status_code == 202
                assert client.post("/v1/documents", json={"title": "No text"}).status_code == 400
                self.api.router.decision = NO_MATCH
                self.chat(client)
                self.api.router.decision = MATCH
                self.chat(client)
                self.chat(client, stream=True)
                self.chat(client, model="base")
        self.generator.numbers.jobs.labels("succeeded").inc(3 * times)
        self.generator.numbers.jobs.labels("failed").inc(times)
        for _ in range(times):
            self.generator.numbers.stage_seconds.labels("generate").observe(0.75)
            self.generator.numbers.batch_documents.observe(3)
        self.generator.numbers.queue.labels("queued").set(times)

    def chat(self, client: httpx.Client, model: str = "imprint", stream: bool = False) -> None:
        body = {"model": model, "messages": MESSAGES, "stream": stream}
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text


class Prometheus:
    """A Prometheus server on loopback with its data in `folder`, reading one address twice: with a key and without."""

    def __init__(self, folder: Path, address: str, key: str) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{_free_port()}"
        job = {"metrics_path": "/metrics", "static_configs": [{"targets": [address]}]}
        config = {
            "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE},
            "scrape_configs": [
                {"job_name": "imprint", "authorization": {"credentials": key}, **job},
                {"job_name": "stranger", **job},
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address={self.url.removeprefix('http://')}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._client = httpx.Client(base_url=self.url, timeout=10, trust_env=False)
        self._at = ""

    def stop(self) -> None:
        """End it; its folder stays."""
        self._client.close()
        self._process.terminate()
        self._process.wait(TIMEOUT_S)

    def get(self, path: str, **params: str) -> Any:
        """The `data` of an answer of its API."""
        response = self._client.get(f"/api/v1/{path}", params=params)
        body = response.json()
        assert body["status"] == "success", body
        return body["data"]

    def vector(self, query: str, *labels: str) -> dict[Any, float]:
        """An instant query's values by the values of one label, or of several; without labels by ().

        Its instant is the scrape that `catch_up` waited for: a later one may have run into its timeout.
        """
        rows = self.get("query", query=query, time=self._at)["result"]
        keys = [tuple(row["metric"][label] for label in labels) for row in rows]
        assert len(set(keys)) == len(keys), rows
        values = (float(row["value"][1]) for row in rows)
        return {key[0] if len(labels) == 1 else key: value for key, value in zip(keys, values, strict=True)}

    def value(self, query: str) -> float:
        """The one value of an instant query without labels."""
        [value] = self.vector(query).values()
        return value

    def catch_up(self) -> None:
        """Wait until what is true now has been scraped."""
        # Of anything but a plain metric, timestamp() gives the time of the query.
        scraped = f'timestamp(up{{job="imprint"}}) > {time.time()} and up == 1 and on () up{{job="stranger"}}'
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            # Right after its start it does not listen yet, or says in plain text that it is not ready.
            with suppress(httpx.TransportError, json.JSONDecodeError):
                rows = self.get("query", query=scraped)["result"]
                if rows:
                    self._at = rows[0]["value"][1]
                    return
            alive = self._process.poll() is None and time.monotonic() < deadline
            assert alive, (self.folder / "log").read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def imprint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Imprint]:
    api = make_api(tmp_path_factory.mktemp("imprint"))
    generator = Generator()
    app = create_app(dataclasses.replace(api.services, generator=generator))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    yield Imprint(api, generator, f"{host}:{port}")
    server.should_exit = True
    thread.join()
    api.registry.close()


@pytest.fixture(scope="module")
def prometheus(imprint: Imprint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has seen the first traffic, then idleness, then the second."""
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), imprint.address, imprint.api.admin_key)
    try:
        imprint.use(FIRST)
        server.catch_up()
        imprint.use(SECOND)
        server.catch_up()
        yield server
    finally:
        server.stop()


def test_metrics_need_the_admin_key(prometheus: Prometheus) -> None:
    assert prometheus.vector("up", "job") == {"imprint": 1, "stranger": 0}
    errors = {target["labels"]["job"]: target["lastError"] for target in prometheus.get("targets")["activeTargets"]}
    assert errors["imprint"] == "" and "401" in errors["stranger"]


def test_every_metric_arrives_with_type_and_help(imprint: Imprint, prometheus: Prometheus) -> None:
    declared = {
        family.name + ("_total" if family.type == "counter" else ""): (family.type, family.documentation)
        for source in (imprint.api.services.metrics, imprint.generator.numbers)
        for family in source.registry.collect()
    }
    arrived = {name: (rows[0]["type"], rows[0]["help"]) for name, rows in prometheus.get("metadata").items()}
    assert {name: arrived.get(name) for name in declared} == declared and len(declared) > 8
    assert prometheus.value("vllm:x") == 1, "vLLM's page is there too"


def test_requests_and_errors(prometheus: Prometheus) -> None:
    total = FIRST + SECOND
    requests = 'imprint_http_requests_total{route=~"/v1/.*"}'
    assert prometheus.vector(f"sum by (route, status) ({requests})", "route", "status") == {
        ("/v1/documents", "202"): 2 * total,
        ("/v1/documents", "400"): total,
        ("/v1/chat/completions", "200"): 4 * total,
    }
    rate = f"sum(rate({requests[:-1]}, status=~'4..'}}[5m])) / sum(rate({requests}[5m]))"
    assert prometheus.value(rate) == pytest.approx(1 / 7, rel=0.05)
    assert prometheus.vector("sum by (outcome) (imprint_documents_posted_total)", "outcome") == {
        "created": total, "existing": total,
    }  # fmt: skip


def test_latencies(imprint: Imprint, prometheus: Prometheus) -> None:
    total = FIRST + SECOND
    name = "imprint_http_request_duration_seconds"
    chat = 'route="/v1/chat/completions"'
    assert prometheus.value(f"sum({name}_count{{{chat}}})") == 4 * total
    median = prometheus.value(f"histogram_quantile(0.5, sum by (le) (rate({name}_bucket{{{chat}}}[5m])))")
    slowest = prometheus.value(f"histogram_quantile(1, sum by (le) (rate({name}_bucket{{{chat}}}[5m])))")
    assert 0 < median <= slowest <= 120
    first = prometheus.vector("sum by (endpoint, stream) (imprint_time_to_first_chunk_seconds_count)",
                              "endpoint", "stream")  # fmt: skip
    assert first == {("chat", "false"): 3 * total, ("chat", "true"): total}
    mean = "sum by (stage) (rate({0}_sum[5m])) / sum by (stage) (rate({0}_count[5m]))"
    stages = prometheus.vector(mean.format("imprint_generation_stage_duration_seconds"), "stage")
    assert stages == {"generate": pytest.approx(0.75, rel=0.05)}


def test_routing(prometheus: Prometheus) -> None:
    total = FIRST + SECOND
    by = prometheus.vector("sum by (reason, answered_by) (imprint_route_decisions_total)", "reason", "answered_by")
    assert by == {
        ("no_candidates", "base"): total,
        ("matched", "adapter"): 2 * total,
        ("base_requested", "base"): total,
    }
    abstained = 'imprint_route_decisions_total{reason!="base_requested", answered_by="base"}'
    routed = 'imprint_route_decisions_total{reason!="base_requested"}'
    assert prometheus.value(f"sum({abstained}) / sum({routed})") == pytest.approx(1 / 3)
    # All scores lie in the bucket from 0.40 to 0.45; within a bucket Prometheus draws a straight line.
    median = prometheus.value("histogram_quantile(0.5, sum by (le) (imprint_route_score_bucket))")
    assert median == pytest.approx(0.425)
    assert prometheus.value("imprint_route_score_sum / imprint_route_score_count") == pytest.approx(0.425)


def test_generation(prometheus: Prometheus) -> None:
    total = FIRST + SECOND
    ended = "imprint_generation_jobs_ended_total"
    assert prometheus.vector(f"sum by (outcome) ({ended})", "outcome") == {"succeeded": 3 * total, "failed": total}
    assert prometheus.value(f'sum({ended}{{outcome="failed"}}) / sum({ended})') == pytest.approx(0.25)
    assert prometheus.vector("imprint_generation_jobs", "state") == {"queued": SECOND}
    batch = "imprint_generation_batch_documents"
    assert prometheus.value(f"{batch}_sum / {batch}_count") == 3
    assert prometheus.value(f"histogram_quantile(1, sum by (le) ({batch}_bucket))") == 4


def test_the_page_has_nothing_that_the_linter_objects_to(imprint: Imprint, prometheus: Prometheus) -> None:
    page = imprint.page()
    assert page.headers["content-type"] == CONTENT_TYPE
    # vLLM's names have colons, which the linter keeps for recording rules.
    ours = "".join(line + "\n" for line in page.text.splitlines() if "vllm:" not in line)
    for name in ("imprint_http_requests_total", "imprint_generation_jobs_ended_total"):
        assert f"{name}{{" in ours
    assert _lint(ours) == (0, "")
    assert _lint(ours + "# TYPE x_total gauge\nx_total 1\n")[0] != 0, "it reads what it is given"


def _lint(page: str) -> tuple[int, str]:
    """promtool's exit status and all that it says."""
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
