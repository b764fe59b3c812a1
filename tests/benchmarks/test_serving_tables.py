"""What the serving benchmarks register is what the server's own parts accept; and their tables' arithmetic."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from benchmarks.serving import adapters, cold, peers, registered, replicas
from benchmarks.serving.client import CUT, OK, Load, Sample
from hypernet.lora import validate_folder
from serve.blobs import BlobStore
from serve.config import ImprintConfig
from serve.deployments.generator import open_generator
from serve.registry import Registry


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "SPARE_BYTES", 0)


@pytest.mark.usefixtures("small_disk")
def test_registered_adapters_can_be_served(tmp_path: Path) -> None:
    found = registered.register(tmp_path / "data", 70, tenants=3)
    assert [one.tenant for one in found.adapters[:4]] == ["bench-000", "bench-001", "bench-002", "bench-000"]
    config = ImprintConfig(data_dir=tmp_path / "data")
    registry, blobs = Registry.open(config.registry.url), BlobStore.open(config.blobs.url)
    holder = registry.authenticate(found.service_key)
    assert holder is not None and {tenant.name for tenant in holder.tenants} == {one.tenant for one in found.adapters}
    ids = {tenant.name: tenant.id for tenant in holder.tenants}
    base = AutoConfig.from_pretrained(config.base_folder())
    weights, stored = [], []
    for number in (0, 1, 64, 69):
        one = found.adapters[number]
        adapter = registry.get_adapter(ids[one.tenant], one.id)
        assert adapter is not None and adapter.state == "ready" and adapter.retired_at is None
        folder = blobs.fetch_folder(adapter.blob_path, tmp_path / one.id, adapter.checksum)
        validate_folder(folder, base, config.engine.max_lora_rank)
        weights.append((folder / "adapter_model.safetensors").read_bytes())
        stored.append(adapter)
    assert weights[0] == weights[2], "the pool's first one, again"
    assert weights[0] != weights[1] != weights[3]
    files = list((tmp_path / "data" / "blobs" / stored[0].blob_path).iterdir())
    assert len(files) == 3 and all(file.stat().st_nlink == 3 for file in files), "they take room once"
    # What the generator does at its start: none may be taken for another base's or generator's.
    generator = open_generator(config, config.base_folder())
    assert registry.mark_stale(generator.base_fingerprint, generator.fingerprint) == 0
    assert not registry.generate_waits()
    registry.close()


def test_too_little_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 30))
    with pytest.raises(OSError, match="3 GiB are free"):
        registered.register(tmp_path / "data", 1)


def test_zipf_traffic_asks_for_the_k_th_adapter_in_proportion_to_one_by_k() -> None:
    several = [registered.RegisteredAdapter(f"adp_{number}", f"t{number}") for number in range(4)]
    requests = list(itertools.islice(adapters.zipf_requests(several, 8, seed=1), 6000))
    counts = Counter(request.model for request in requests)
    total = sum(1 / rank for rank in range(1, 5))
    for rank, adapter in enumerate(several, 1):
        assert counts[adapter.id] / 6000 == pytest.approx(1 / rank / total, abs=0.03)
    assert all(request.headers["X-Tenant-ID"] == f"t{request.model[-1]}" for request in requests)
    assert len({request.prompt for request in requests}) > 5900
    drawn = [len({request.model for request in requests[begin : begin + 3]}) for begin in range(0, 6000, 3)]
    assert adapters.expected_distinct(4, 3) == pytest.approx(sum(drawn) / len(drawn), abs=0.05)


def test_metrics_are_compared_by_name_and_labels() -> None:
    hits = "imprint_adapter_hits_total"
    before: adapters.Metrics = {(hits, (("replica", "a"), ("tier", "cpu"))): 2.0}
    after: adapters.Metrics = {
        (hits, (("replica", "a"), ("tier", "cpu"))): 5.0,
        (hits, (("replica", "b"), ("tier", "cpu"))): 1.0,
        (hits, (("replica", "a"), ("tier", "slot"))): 7.0,
    }
    spent = adapters.difference(before, after)
    assert adapters.value(spent, hits, tier="cpu") == 4.0
    assert adapters.value(spent, hits, tier="blobs") == 0.0


def test_a_fault_is_told_from_the_run() -> None:
    good = [Sample(0.0, 100.0 + i / 10, [], OK) for i in range(600) if not 200 <= i < 270]
    load = Load([*good, Sample(0.0, 120.0, [], CUT)], 100.0, 160.0)
    found = replicas.timeline(load, fault=120.0, ended=160.0)
    assert found["outcomes"] == {OK: 530, CUT: 1} and (found["ok"], found["cut"]) == (530, 1)
    assert found["before_per_s"] == pytest.approx(10, rel=0.01)
    assert found["recovered_s"] == pytest.approx(6.0)
    assert found["per_s"][10] == 10 and found["per_s"][22] == 0


def test_comparisons_that_are_not_repeated_keep_their_tables(tmp_path: Path) -> None:
    run = {metric: 2.0 for metric in peers.METRICS}
    found = {system: {concurrency: [run] for concurrency in peers.CONCURRENCY} for system in ("ours", "theirs")}
    result = {"machine": "m", "output_tokens": 1, "comparisons": {peers.WRAPPER: found}}
    file = tmp_path / "serving_peers.json"
    assert peers.earlier(file) == {}
    file.write_text(json.dumps(result))
    assert peers.report({**result, "comparisons": peers.earlier(file)}) == peers.report(result)


def test_reports_are_markdown_tables_also_where_values_are_missing() -> None:
    row = {
        "slots": 4, "registered": 1000, "at_once": 20.1, "requests_per_s": 9.0, "ratio": 0.91,
        "ttft_ms": {"p50": 1.0, "p95": 2.0},
        "itl_ms": {"p50": 1.0, "p95": 2.0}, "errors": {}, "hits": dict.fromkeys(adapters.TIERS),
        "load_ms": {"p50": None, "p99": None}, "fetch_ms": None, "thrash": {"slot": 0.5, "cpu": 0.0},
    }  # fmt: skip
    many = adapters.report({"machine": "M", "rows": [row], "concurrency": 32, "max_tokens": 32, "cpu_loras": 256,
                            "tenants": 100, "seconds": 60.0, "warm_up_s": 20.0})
    assert "1,000 adapters to 5 (goal: at least 0.9): 4 slots 0.91." in many
    rows: dict[str, Any] = {name: {"samples": 0, "p50": None, "p95": None} for name in cold.TITLES}
    rows["base"] = {"samples": 3, "p50": 10.0, "p95": 11.0}
    rows["blobs"] = {"samples": 3, "p50": 15.5, "p95": 16.0}
    assert "| cold: in the blob store only | 3 | 15.5 | 16.0 | +5.5 |" in cold.report(
        {"machine": "M", "slots": 4, "cpu_loras": 8, "rows": rows}
    )
    of_one = {**row, "replicas": 1, "concurrency": 8}
    killed = {"concurrency": 32, "outcomes": {OK: 5}, "retried": 2, "before_per_s": 4.0, "lowest_per_s": 1.0,
              "recovered_s": 3.0, "answers_s": 40.0, "serves_s": None}
    table = replicas.report({"machine": "M", "seconds": 60.0, "max_tokens": 32, "killed": killed,
                             "rows": [of_one, {**of_one, "replicas": 2, "requests_per_s": 18.0}]})
    assert "| 2 | 8 | 18.00 | 2.00 |" in table and "| new replica serves after | never |" in table
    for text in (many, table):
        for block in text.split("\n\n"):
            widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
            assert len(widths) <= 1, block
