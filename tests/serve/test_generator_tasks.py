"""Posts with mode "task" in the worker, with a random Text-to-LoRA network in the published format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hypernet.documents import DocumentText
from hypernet.fingerprint import fingerprint_folder
from hypernet.generate import GeneratedDocument
from hypernet.lora import LoraAdapter
from hypernet.published.convert import convert
from hypernet.tasks import TaskGenerator
from serve.deployments.generator_jobs import Plan
from tests.hypernet.published_helpers import save_text_to_lora, text_to_lora_shapes, write_base, write_encoder
from tests.serve.generator_bench import Bench, open_bench

TASK = "Translate the sentence into French."


class NoDocuments:
    """Stands for a generator of documents where none is posted."""

    def __init__(self, base: Path) -> None:
        self.base_fingerprint, self.fingerprint = fingerprint_folder(base), "documents"

    def plan(self, document: DocumentText) -> Plan:
        raise AssertionError("a task was taken for a document")

    def generate(self, documents: Sequence[DocumentText], plans: Sequence[Plan]) -> list[GeneratedDocument]:
        raise AssertionError("a task was taken for a document")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "mistral")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TaskGenerator:
    folder = tmp_path_factory.mktemp("tasks")
    convert(save_text_to_lora(folder / "source", text_to_lora_shapes()), folder / "converted", base=base)
    return TaskGenerator(folder / "converted", base, str(write_encoder(folder / "encoder")))


@pytest.fixture
def bench(tmp_path: Path, base: Path, tasks: TaskGenerator) -> Iterator[Bench]:
    with open_bench(tmp_path, base, NoDocuments(base), tasks=tasks) as opened:
        yield opened


def test_a_task_becomes_an_adapter(bench: Bench, tasks: TaskGenerator, tmp_path: Path) -> None:
    posted = bench.post(TASK, mode="task")
    bench.worker.run_once()
    assert bench.job(posted).state == "succeeded" and bench.document(posted).state == "ready"
    (adapter,) = bench.current(posted)
    assert adapter.manifest["generator"] == "text-to-lora"
    assert adapter.manifest["task_fingerprint"] == tasks.fingerprint
    folder = bench.blobs.fetch_folder(adapter.blob_path, tmp_path / "fetched", adapter.checksum)
    (wanted,) = tasks.generate([TASK])
    stored = LoraAdapter.load(folder)
    assert all((stored.tensors[path][1] == b).all() for path, (_, b) in wanted.tensors.items())
    (routable,) = bench.registry.routable(bench.tenant_id)
    assert routable.mode == "task" and routable.spans == ()
    # A task's adapter is not refined: there is no document to learn from.
    assert bench.registry.count_jobs("refine")["queued"] == 0


def test_a_restart_does_not_make_tasks_anew(bench: Bench) -> None:
    posted = bench.post(TASK, mode="task")
    bench.worker.run_once()
    before = bench.current(posted)
    bench.worker.start()
    assert bench.registry.count_jobs()["queued"] == 0 and bench.current(posted) == before


def test_a_task_without_a_network_fails_with_a_message(tmp_path: Path, base: Path) -> None:
    with open_bench(tmp_path, base, NoDocuments(base)) as bench:
        posted = bench.post(TASK, mode="task")
        bench.worker.run_once()
        job = bench.job(posted)
        assert job.state == "failed" and "mode: 'task' needs generator.task.checkpoint" in (job.error or "")
        assert bench.document(posted).state == "failed"


def test_a_bad_description_fails_alone(bench: Bench) -> None:
    bad, good = bench.post("word " * 500, mode="task"), bench.post(TASK, mode="task")
    bench.worker.run_once()
    assert bench.job(bad).state == "failed" and "text: is too long" in (bench.job(bad).error or "")
    assert bench.job(good).state == "succeeded"
