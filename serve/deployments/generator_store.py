"""From adapters as tensors to published ones: staging, validation, the blob store, centroids, one transaction."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hypernet.documents import DocumentText
from hypernet.lora import LoraAdapter, validate_folder
from hypernet.names import named_passages
from hypernet.probes import make_probes
from router.centroids import document_centroids
from router.embed import Encoder
from serve.blobs import BlobStore
from serve.config import ImprintConfig, RouterConfig
from serve.deployments.generator_leases import HeldJobs
from serve.ids import new_id
from serve.metrics import GeneratorMetrics
from serve.registry import Registry
from serve.registry.records import Adapter, ChangeEvent, DocumentVersion, LeasedJob, NewAdapter, NewCentroids, NewPart

Span = tuple[int, int]
MAX_QUESTIONS = 16
"""Questions embedded of one part, of which a few centroids are made."""


@dataclass(frozen=True)
class StagedAdapter:
    """An adapter that has its ID and lies, valid, in a local folder."""

    id: str
    folder: Path
    lora: LoraAdapter


@dataclass(frozen=True)
class FinishedPart:
    """A part adapter as it is to be published. `spans`: what it covers of the text, in characters; empty: all."""

    staged: StagedAdapter
    spans: Sequence[Span]
    manifest: Mapping[str, Any]
    state: Literal["ready", "degraded"]
    generator_fingerprint: str


class AdapterStore:
    """Writes, reads and publishes the adapters of one worker's jobs."""

    def __init__(
        self,
        config: ImprintConfig,
        registry: Registry,
        blobs: BlobStore,
        encoders: Sequence[Encoder],
        base_config: Any,
        base_fingerprint: str,
        held: HeldJobs,
        metrics: GeneratorMetrics,
    ) -> None:
        """Documents get vectors of each of the `encoders`. `base_config` is the base's transformers configuration."""
        self._config = config
        self._registry = registry
        self._blobs = blobs
        self._encoders = encoders
        self._base_config = base_config
        self._base_fingerprint = base_fingerprint
        self._held = held
        self._metrics = metrics

    @contextmanager
    def staged(self, loras: Sequence[LoraAdapter]) -> Iterator[list[StagedAdapter]]:
        """The adapters on disk, checked as they are there, until the context ends. Raises AdapterInvalid."""
        self._config.staging_dir.mkdir(parents=True, exist_ok=True)
        folders: list[Path] = []
        try:
            staged = []
            for lora in loras:
                adapter_id = new_id("adp")
                folders.append(self._folder(adapter_id))
                lora.save(folders[-1])
                validate_folder(folders[-1], self._base_config, self._config.engine.max_lora_rank)
                staged.append(StagedAdapter(adapter_id, folders[-1], lora))
            yield staged
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, item: LeasedJob, parts: Sequence[FinishedPart], **options: Any) -> ChangeEvent:
        """Store all parts and make them visible in one transaction. `options` go to `Registry.publish`.

        Raises LeaseLost, Stopping and the errors of storage and registry; then nothing is left behind.
        """
        paths = [f"adapters/{item.job.tenant_id}/{part.staged.id}" for part in parts]
        try:
            with self._metrics.stage_seconds.labels("upload").time():
                stored = [self._blobs.put_folder(path, part.staged.folder)
                          for path, part in zip(paths, parts, strict=True)]
            self._held.progress(item, "uploaded", 0.95)
            self._held.reached("uploaded", [item])
            with self._metrics.stage_seconds.labels("centroids").time():
                centroids = [
                    [embedded(encoder, self._config.router, item.version, part.spans, len(parts) > 1)
                     for encoder in self._encoders]
                    for part in parts
                ]
            new = [
                NewAdapter(
                    id=part.staged.id,
                    kind="lora",
                    rank=part.staged.lora.rank,
                    alpha=part.staged.lora.alpha,
                    target_modules=part.staged.lora.target_modules,
                    blob_path=folder.prefix,
                    checksum=folder.checksum,
                    size_bytes=folder.size_bytes,
                    base_fingerprint=self._base_fingerprint,
                    generator_fingerprint=part.generator_fingerprint,
                    manifest=part.manifest,
                    state=part.state,
                    part=index,
                    parts=len(parts),
                )
                for index, (part, folder) in enumerate(zip(parts, stored, strict=True))
            ]
            made: list[NewPart] = [(one, first, *more) for one, (first, *more) in zip(new, centroids, strict=True)]
            return self._registry.publish(item.job.id, self._held.worker, made, **options)
        except Exception:
            # Never published, so nobody can name them.
            for path in paths:
                self._blobs.delete_folder(path)
            raise

    def load(self, adapter: Adapter) -> LoraAdapter:
        """A published adapter's tensors. Raises BlobError, OSError, AdapterInvalid."""
        self._config.staging_dir.mkdir(parents=True, exist_ok=True)
        folder = self._folder(adapter.id)
        try:
            return LoraAdapter.load(self._blobs.fetch_folder(adapter.blob_path, folder / "files", adapter.checksum))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, adapter_id: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{adapter_id}-", dir=self._config.staging_dir))


def embedded(
    encoder: Encoder, settings: RouterConfig, version: DocumentVersion, spans: Sequence[Span], part: bool
) -> NewCentroids:
    """Vectors of these spans of a version's text, of all of it without any; `part`: each with the name that it is
    about, which may stand in another part. Raises ValueError for a text that gives no vectors."""
    text = version.text
    passages = named_passages(text, spans) if part else [text[start:end] for start, end in spans] or [text]
    questions: list[str] = []
    if settings.question_centroids and version.mode == "document":
        probes = make_probes(DocumentText(version.title, text), list(spans) or None, MAX_QUESTIONS)
        questions = [probe.question for probe in probes]
    matrix = document_centroids(
        encoder, version.title, passages, settings.centroids_per_adapter, part=part,
        questions=questions, question_k=settings.question_centroids,
    )
    return NewCentroids(encoder.id, encoder.version, matrix)
