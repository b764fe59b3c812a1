"""Two Ray nodes in network namespaces, an engine on each; one node is killed under load."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from tests.postgresql import running_cluster
from tests.processes import kill
from tests.ray_nodes import ROOT, RayNode
from tests.system.networks import Host, hosts

pytestmark = [
    pytest.mark.system,
    pytest.mark.own_server,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

IMPRINT = str(Path(sys.executable).parent / "imprint")
LOST_S = 120.0
RETRYABLE = {429, 500, 502, 503, 504}


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[list[Host]]:
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    # Reached through a socket in the file system, which namespaces of the network share.
    with running_cluster() as cluster, cluster.database() as url:
        yield url


def config_for(folder: Path, registry: str) -> dict[str, Any]:
    """configs/cluster.yaml, with a registry and blobs that are here, and of a size for this machine."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    args = config["applications"][0]["args"]
    args |= {"data_dir": str(folder / "data"), "registry": {"url": registry}, "blobs": {"url": f"file://{folder}/blobs"}}
    args["engine"] |= {"autoscaling": None, "num_replicas": 2, "max_loras": 4, "max_cpu_loras": 8, "kv_cache_gib": 1}
    args["generator"] |= {"num_replicas": 1, "refine": {"enabled": False}}
    return config


def test_a_node_is_killed_under_load(two_hosts: list[Host], database: str, tmp_path: Path) -> None:
    first, second = two_hosts
    # Both engines run on this machine: each gets a core of its own.
    head = RayNode(first.address, before=first.enter, environment={"VLLM_CPU_OMP_THREADS_BIND": "0"})
    last_core = {"VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0)))}
    worker = RayNode(second.address, head, before=second.enter, environment=last_core)
    config = config_for(tmp_path, database)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    try:
        head.start()
        worker.start()
        assert head.status()["nodes"] == 2
        head.deploy(config)
        head.await_running(engine=2)
        engines = [len(_engines(host)) for host in two_hosts]
        assert engines == [1, 1], engines
        key = head.run(IMPRINT, "key", "create", "--tenant", "acme", "--config", str(file), "--local").split()[-1]
        _is_refused_without_the_token(head, second)

        # Posted through one node, answered through the other.
        adapters = [_post(url(first), key, number) for number in range(4)]
        for host in two_hosts:
            for adapter in adapters:
                assert _ask(url(host), key, adapter) == "answered"

        outcomes, recovered = _kill_under_load(head, first, second, key, adapters)
        print(f"node killed: {dict(outcomes)}; answered again by every client after {recovered:.1f} s")
        assert outcomes["answered"] > 0
        wrong = {outcome for outcome in outcomes if outcome != "answered" and not outcome.startswith("retryable")}
        assert not wrong, outcomes
        for adapter in adapters:
            assert _ask(url(first), key, adapter) == "answered"
        status = head.status()
        assert status["nodes"] == 1
        # The controller knows that an engine is missing and has no other node for it.
        engine = status["applications"]["imprint"]["deployments"]["engine"]
        assert engine.get("RUNNING") == 1 and sum(engine.values()) == 2, status
        assert _post(url(first), key, 99)
    finally:
        worker.remove()
        head.remove()


def url(host: Host) -> str:
    """The API through the proxy on a host."""
    return f"http://{host.address}:8000"


def _kill_under_load(
    head: RayNode, stays: Host, dies: Host, key: str, adapters: list[str]
) -> tuple[Counter[str], float]:
    """kill -9 of everything on one host while clients ask through the other: what became of the requests, and the
    seconds until every client had an answer to a request that it sent after the kill."""
    stop = threading.Event()
    outcomes: Counter[str] = Counter()
    answered_at: dict[int, float] = {}
    killed = float("inf")

    def load(number: int) -> None:
        while not stop.is_set():
            started = time.monotonic()
            outcome = _ask(url(stays), key, adapters[number % len(adapters)], streaming=number % 2 == 0)
            outcomes[outcome] += 1
            if outcome == "answered" and started > killed:
                answered_at.setdefault(number, time.monotonic())

    clients = 4
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(load, number) for number in range(clients)]
        try:
            before = _engine_seconds(dies)
            time.sleep(8)
            assert outcomes["answered"], outcomes
            assert _engine_seconds(dies) > before + 1, "the engine that is to die had nothing to do"
            processes = dies.processes()
            killed = time.monotonic()
            kill(processes, 30)
            while len(answered_at) < clients or head.status()["nodes"] > 1:
                assert time.monotonic() < killed + LOST_S, (outcomes, head.status(), head.logs())
                time.sleep(1)
            time.sleep(3)
        finally:
            stop.set()
        for one in running:
            one.result()
    return outcomes, max(answered_at.values()) - killed


def _post(base: str, key: str, number: int) -> str:
    text = f"The caretaker of House {number} is Edda Brant{number}."
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=base, headers=headers, timeout=120, trust_env=False) as client:
        response = client.post("/v1/documents?wait=60", json={"title": f"House {number}", "text": text})
        assert response.status_code == 200, response.text
        return str(response.json()["adapter_id"])


def _ask(base: str, key: str, adapter: str, streaming: bool = False) -> str:
    """One request; what became of it. `retryable`: an error after which OpenAI's clients ask again by themselves, or a
    stream that ended with an error."""
    http = httpx.Client(timeout=120, trust_env=False)
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, http_client=http)
    # Streams are long, so that a node that dies has some that have begun.
    tokens = 400 if streaming else 16
    options: dict[str, Any] = {"max_completion_tokens": tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}
    messages: Any = [{"role": "user", "content": "Who is the caretaker?"}]
    try:
        with http:
            if not streaming:
                return "answered" if client.chat.completions.create(model=adapter, messages=messages, **options) else ""
            finish = None
            for chunk in client.chat.completions.create(model=adapter, messages=messages, stream=True, **options):
                finish = chunk.choices[0].finish_reason or finish
            return "answered" if finish == "length" else f"stream without an end: {finish}"
    except openai.APIStatusError as error:
        kind = "retryable" if error.status_code in RETRYABLE else "final"
        return f"{kind}: status {error.status_code} {getattr(error, 'code', '')}"
    except openai.APIConnectionError:
        return "retryable: connection lost"
    except openai.APIError as error:
        return f"retryable: stream ended with {error.code}"
    except httpx.TransportError as error:
        return f"retryable: {type(error).__name__} in a stream"


def _engines(host: Host) -> list[psutil.Process]:
    return [one for one in host.processes() if " ".join(one.cmdline()).startswith("VLLM::EngineCore")]


def _engine_seconds(host: Host) -> float:
    """Processor time of the engines on a host so far."""
    times = [engine.cpu_times() for engine in _engines(host)]
    return sum(one.user + one.system for one in times)


def _is_refused_without_the_token(head: RayNode, host: Host) -> None:
    """Who reaches Ray's ports and has another token cannot do anything with them."""
    stranger = RayNode(host.address, head, before=host.enter, environment={"RAY_AUTH_TOKEN": "of-somebody-else"})
    with pytest.raises(AssertionError, match=r"(?i)unauthenticated|authentication|token"):
        stranger.status()
