"""The generator's worker over a real registry, blob store, encoder and (tiny, random) hypernetwork."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hypernet.documents import Chunk, DocumentText
from hypernet.generate import GeneratedAdapter, HypernetGenerator
from hypernet.lora import LoraAdapter
from router.embed import MiniLmEncoder
from serve.blobs import BlobStore
from serve.config import ImprintConfig
from serve.deployments.generator_worker import GeneratorWorker
from serve.metrics import GeneratorMetrics
from serve.registry import Registry, migrate
from serve.registry.records import Job, PostResult
from tests.tiny_pair import make_pair


@dataclass
class Bench:
    """A worker and what it works on."""

    worker: GeneratorWorker
    registry: Registry
    blobs: BlobStore
    generator: HypernetGenerator
    config: ImprintConfig
    tenant_id: str

    def post(self, text: str, **fields: Any) -> PostResult:
        return self.registry.post_document(self.tenant_id, "Notice", text, **fields)

    def job(self, posted: PostResult) -> Job:
        job = self.registry.get_job(self.tenant_id, posted.job.id)
        assert job is not None
        return job


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def encoder() -> MiniLmEncoder:
    return MiniLmEncoder.load()


@pytest.fixture
def bench(tmp_path: Path, pair: tuple[Path, Path], encoder: MiniLmEncoder) -> Iterator[Bench]:
    base, checkpoint = pair
    config = ImprintConfig(
        data_dir=tmp_path, base={"model": str(base)}, generator={"checkpoint": str(checkpoint), "lease_s": 5}
    )
    migrate(config.registry.url)
    registry = Registry.open(config.registry.url)
    blobs = BlobStore.open(config.blobs.url)
    generator = HypernetGenerator.load(checkpoint, base)
    worker = GeneratorWorker(
        config, registry, blobs, generator, encoder, AutoConfig.from_pretrained(base), GeneratorMetrics()
    )
    yield Bench(worker, registry, blobs, generator, config, registry.create_tenant("acme").id)
    worker.stop()
    registry.close()


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
        assert adapter.manifest["chunks"][0]["start"] == 0
    assert len(bench.registry.routable(bench.tenant_id)) == 3
    assert list(bench.config.staging_dir.iterdir()) == []
    assert bench.worker.run_once() == 0


def test_a_document_is_cut_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    whole = bench.generator.chunk

    def chunk(document: DocumentText) -> list[Chunk]:
        seen.append(document.text)
        return whole(document)

    monkeypatch.setattr(bench.generator, "chunk", chunk)
    posted = [bench.post("Room 1 is blue."), bench.post("Room 2 is red.")]
    bench.worker.run_once()
    assert sorted(seen) == ["Room 1 is blue.", "Room 2 is red."]
    assert [bench.job(post).state for post in posted] == ["succeeded", "succeeded"]


def test_a_bad_document_fails_alone(bench: Bench) -> None:
    bad, good = bench.post("word " * 100_000), bench.post("The lamp is red.")
    bench.worker.run_once()
    assert bench.job(bad).state == "failed" and "tokens" in (bench.job(bad).error or "")
    assert bench.job(good).state == "succeeded"


def test_a_batch_that_fails_is_tried_one_by_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.generator.generate

    def generate(documents: Sequence[DocumentText], chunks: Sequence[list[Chunk]]) -> list[GeneratedAdapter]:
        if any("poison" in document.text for document in documents):
            raise MemoryError("too much")
        return whole(documents, chunks)

    monkeypatch.setattr(bench.generator, "generate", generate)
    poison, good = bench.post("A poison."), bench.post("The lamp is red.")
    bench.worker.run_once()
    assert bench.job(good).state == "succeeded"
    job = bench.job(poison)
    assert job.state == "queued" and job.attempts == 1  # again later: memory may be free by then


def test_an_invalid_adapter_is_never_published(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.generator.generate

    def generate(documents: Sequence[DocumentText], chunks: Sequence[list[Chunk]]) -> list[GeneratedAdapter]:
        broken = []
        for generated in whole(documents, chunks):
            tensors = {path: (a, torch.full_like(b, float("nan"))) for path, (a, b) in generated.lora.tensors.items()}
            broken.append(replace(generated, lora=replace(generated.lora, tensors=tensors)))
        return broken

    monkeypatch.setattr(bench.generator, "generate", generate)
    posted = bench.post("The lamp is red.")
    bench.worker.run_once()
    job = bench.job(posted)
    assert job.state == "failed" and "finite" in (job.error or "")
    assert bench.registry.list_adapters(bench.tenant_id).items == []
    assert not list((bench.config.data_dir / "blobs").rglob("*.safetensors"))


def test_a_document_deleted_on_the_way_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    posted, other = bench.post("The lamp is red."), bench.post("The door is green.")
    whole = bench.generator.generate

    def generate(documents: Sequence[DocumentText], chunks: Sequence[list[Chunk]]) -> list[GeneratedAdapter]:
        bench.registry.delete_document(bench.tenant_id, posted.document.id)
        return whole(documents, chunks)

    monkeypatch.setattr(bench.generator, "generate", generate)
    bench.worker.run_once()
    assert bench.job(other).state == "succeeded"
    assert len(list((bench.config.data_dir / "blobs").rglob("*.safetensors"))) == 1


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


def test_a_change_of_fingerprints_queues_documents_again(bench: Bench) -> None:
    posted = bench.post("The lamp is red.")
    bench.worker.run_once()
    bench.generator.fingerprint = "another"
    bench.worker.start()
    first = bench.job(posted).adapter_id
    while True:
        document = bench.registry.get_document(bench.tenant_id, posted.document.id)
        assert document is not None
        if document.state == "ready" and document.adapter_id != first:
            return
