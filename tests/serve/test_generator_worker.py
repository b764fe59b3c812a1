"""The generator's worker over a real registry, blob store, encoder and (tiny, random) hypernetwork."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypernet.documents import DocumentText
from hypernet.generate import GeneratedDocument, HypernetGenerator
from hypernet.lora import LoraAdapter
from hypernet.parts import PartLimits
from serve.deployments.generator_jobs import Plan
from tests.serve.generator_bench import Bench, open_bench
from tests.tiny_pair import make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def bench(tmp_path: Path, pair: tuple[Path, Path]) -> Iterator[Bench]:
    base, checkpoint = pair
    with open_bench(tmp_path, base, HypernetGenerator.load(checkpoint, base)) as opened:
        yield opened


def test_batch_is_published(bench: Bench, tmp_path: Path) -> None:
    posted = [bench.post(f"Room {number} is blue. It has {number} doors.") for number in range(3)]
    assert bench.worker.run_once() == 3
    for post in posted:
        job = bench.job(post)
        assert job.state == "succeeded" and job.adapter_id is not None
        adapter = bench.registry.get_adapter(bench.tenant_id, job.adapter_id)
        assert adapter is not None and adapter.base_fingerprint == bench.generator.base_fingerprint
        folder = bench.blobs.fetch_folder(adapter.blob_path, tmp_path / "fetched" / adapter.id, adapter.checksum)
        assert LoraAdapter.load(folder).rank == adapter.rank
        assert adapter.manifest["chunks"][0]["start"] == 0 and adapter.manifest["gate"] == {"state": "off"}
    assert len(bench.registry.routable(bench.tenant_id)) == 3
    assert list(bench.config.staging_dir.iterdir()) == []
    assert bench.worker.run_once() == 0


def test_a_document_is_cut_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    whole = bench.generator.plan

    def plan(document: DocumentText) -> Plan:
        seen.append(document.text)
        return whole(document)

    monkeypatch.setattr(bench.generator, "plan", plan)
    posted = [bench.post("Room 1 is blue."), bench.post("Room 2 is red.")]
    bench.worker.run_once()
    assert sorted(seen) == ["Room 1 is blue.", "Room 2 is red."]
    assert [bench.job(post).state for post in posted] == ["succeeded", "succeeded"]


def test_a_bad_document_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.generator, "limits", PartLimits(chunks=2, parts=4))
    bad, good = bench.post("word " * 10_000), bench.post("The lamp is red.")
    bench.worker.run_once()
    assert bench.job(bad).state == "failed" and "tokens" in (bench.job(bad).error or "")
    assert bench.job(good).state == "succeeded"


def test_a_batch_that_fails_is_tried_one_by_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.generator.generate

    def generate(documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        if any("poison" in document.text for document in documents):
            raise MemoryError("too much")
        return whole(documents, plans)

    monkeypatch.setattr(bench.generator, "generate", generate)
    poison, good = bench.post("A poison."), bench.post("The lamp is red.")
    bench.worker.run_once()
    assert bench.job(good).state == "succeeded"
    job = bench.job(poison)
    assert job.state == "queued" and job.attempts == 1  # again later: memory may be free by then


def test_an_invalid_adapter_is_never_published(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.generator.generate

    def generate(documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        broken = []
        for generated in whole(documents, plans):
            (part,) = generated.parts
            tensors = {path: (a, torch.full_like(b, float("nan"))) for path, (a, b) in part.lora.tensors.items()}
            broken.append(GeneratedDocument([replace(part, lora=replace(part.lora, tensors=tensors))]))
        return broken

    monkeypatch.setattr(bench.generator, "generate", generate)
    posted = bench.post("The lamp is red.")
    bench.worker.run_once()
    job = bench.job(posted)
    assert job.state == "failed" and "finite" in (job.error or "")
    assert bench.registry.list_adapters(bench.tenant_id).items == []
    assert bench.stored() == 0


def test_a_document_deleted_on_the_way_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    posted, other = bench.post("The lamp is red."), bench.post("The door is green.")
    whole = bench.generator.generate

    def generate(documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        bench.registry.delete_document(bench.tenant_id, posted.document.id)
        return whole(documents, plans)

    monkeypatch.setattr(bench.generator, "generate", generate)
    bench.worker.run_once()
    assert bench.job(other).state == "succeeded"
    assert bench.stored() == 1


def test_held_jobs_keep_their_lease_and_are_taken_up_again(bench: Bench) -> None:
    bench.config.generator.hold_at = "generated"
    posted = bench.post("The lamp is red.")
    bench.worker.start()
    while bench.job(posted).stage != "generated":
        pass
    first_end = bench.job(posted).lease_expires_at
    assert first_end is not None
    while (bench.job(posted).lease_expires_at or 0) <= first_end:
        pass
    assert bench.registry.lease_jobs("another", 10, 60) == []
    assert bench.worker.alive()
    bench.worker.stop(timeout_s=0.1)
    assert not bench.registry.list_adapters(bench.tenant_id).items
