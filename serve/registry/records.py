"""The registry's value objects: frozen, detached from the database, safe to hand between threads and processes.

Times are seconds since the epoch (float). IDs are those of `serve.ids`. Every record of a tenant's data carries
`tenant_id`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

Scope = Literal["tenant", "service", "admin"]
JobState = Literal["queued", "running", "succeeded", "failed"]
JobKind = Literal["generate", "refine"]
DocumentMode = Literal["document", "task"]
Probe = dict[str, str | None]
"""A question about a document, by the client: `question`, and `answer` or None."""
AdapterState = Literal["ready", "degraded", "stale", "deleted"]
DocumentState = Literal["processing", "ready", "degraded", "failed", "deleted"]
VersionState = Literal["processing", "ready", "degraded", "stale", "failed"]
EventKind = Literal[
    "adapter_published",
    "adapter_superseded",
    "adapters_stale",
    "centroids_added",
    "document_deleted",
    "document_rolled_back",
    "document_updated",
    "policy_changed",
]
CalibrationStage = Literal["live", "shadow", "retired"]
Rating = Literal["up", "down"]
ResolutionKind = Literal["adapter", "document", "collection", "alias"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, newest first. `next_cursor` is None on the last page."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """An owner of documents, adapters and keys. `id` is `ten_…`; clients may use `name` as well."""

    id: str
    name: str
    created_at: float


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. `tenant_ids` has one entry for a tenant key, any number for a service key, none
    for an admin key."""

    id: str
    scope: Scope
    label: str
    tenant_ids: tuple[str, ...]
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from. Use `serve.tenants.select_tenant` to turn it and the header into one tenant."""

    key_id: str
    scope: Scope
    tenants: tuple[Tenant, ...]


@dataclass(frozen=True, slots=True)
class Collection:
    """A named group of a tenant's documents."""

    id: str
    tenant_id: str
    name: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it stands now.

    `version` is the one that is to be served: the newest, or the one that it was rolled back to; `job_id` is the
    newest "generate" job for it, and `title`, `mode` and `content_hash` are its own. `latest_version` is the newest
    one posted. `current_version` and `adapter_ids` (one for each part, in order) are what is served, nothing before
    the first publication; `adapter_id` is the first of them.
    `state` is "processing" while `version`'s job is queued or running (another version may be served meanwhile, if
    `adapter_ids` is not empty), "failed" when that job failed, else "ready" when any of its parts is, or "degraded".
    `degraded_parts` are the numbers, from 0, of those that are not. A "refine" job changes none of this.
    """

    id: str
    tenant_id: str
    external_id: str | None
    collection_id: str | None
    collection: str | None
    title: str
    mode: DocumentMode
    metadata: Mapping[str, Any]
    content_hash: str
    version: int
    latest_version: int
    current_version: int | None
    adapter_id: str | None
    adapter_ids: tuple[str, ...]
    degraded_parts: tuple[int, ...]
    job_id: str
    state: DocumentState
    created_at: float
    updated_at: float
    deleted_at: float | None


@dataclass(frozen=True, slots=True)
class DocumentVersion:
    """One immutable version; `number` counts from 1 within its document. Deletion empties `text` and `probes`.

    In mode "task" the text describes a task instead of holding facts. `probes` are the client's questions for the
    quality gate, none where the gate makes its own.
    """

    document_id: str
    tenant_id: str
    number: int
    title: str
    text: str = field(repr=False)
    content_hash: str
    size_bytes: int
    created_at: float
    mode: DocumentMode = "document"
    probes: tuple[Probe, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class VersionSummary:
    """A version in its document's history: all but its text, and what became of it.

    `job_id` is its newest "generate" job, `adapter_ids` are the adapters (in order of part) that it had last; none
    before its first publication. `current`: they are being served. `state` is theirs ("ready" and "degraded" can be
    served at once); without any, or where they are stale, "processing" while a job is queued or running.
    """

    document_id: str
    tenant_id: str
    number: int
    title: str
    mode: DocumentMode
    content_hash: str
    size_bytes: int
    created_at: float
    state: VersionState
    current: bool
    adapter_ids: tuple[str, ...]
    job_id: str | None


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a rollback has done. While `job` is queued or running, the version that was served before still is."""

    document: Document
    job: Job


@dataclass(frozen=True, slots=True)
class Job:
    """One run for one document version. `fraction` is progress in 0..1 within the whole job.

    A "generate" job makes the version's adapters; a "refine" job improves them later, when nothing else is to do.
    `note` says why a job ended without new adapters although nothing failed, else it is None. `adapter_id` is the
    first of the parts that the job has published.
    """

    id: str
    tenant_id: str
    document_id: str
    version: int
    kind: JobKind
    state: JobState
    stage: str
    fraction: float
    attempts: int
    error: str | None
    note: str | None
    worker: str | None
    lease_expires_at: float | None
    adapter_id: str | None
    created_at: float
    updated_at: float
    finished_at: float | None


@dataclass(frozen=True, slots=True)
class LeasedJob:
    """A job that the caller holds until `job.lease_expires_at`, with all that it needs to run it."""

    job: Job
    document: Document
    version: DocumentVersion


@dataclass(frozen=True, slots=True)
class PostResult:
    """`created` is False when an existing version with the same content was returned. `replayed` is True when an
    `Idempotency-Key` was seen before; the other fields then are what the first call answered, as they stand now."""

    document: Document
    version: DocumentVersion
    job: Job
    created: bool
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """What a generator hands to `Registry.publish`. `checksum` is SHA-256 (hex) of the adapter's blob manifest.

    A document has one adapter or several: `part` counts them from 0, `parts` is how many there are. The spans of text
    that a part covers are `manifest["chunks"]` (objects with `start` and `end`, in characters).
    """

    id: str
    kind: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    blob_path: str
    checksum: str
    size_bytes: int
    base_fingerprint: str
    generator_fingerprint: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    state: Literal["ready", "degraded"] = "ready"
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class NewCentroids:
    """Embedding vectors of one adapter: `matrix` is float32 [centroids, dimension], rows L2-normalised."""

    encoder: str
    version: str
    matrix: npt.NDArray[np.float32]


NewPart = tuple[NewAdapter, NewCentroids, *tuple[NewCentroids, ...]]
"""An adapter that is to be published, with its vectors of one encoder or several."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published adapter; immutable but for `state` and `retired_at`.

    `retired_at` is set when it is no longer one of its document's current adapters (one for each part). A retired
    adapter is never routed to, but stays usable when pinned by its ID.
    """

    id: str
    tenant_id: str
    document_id: str
    version: int
    job_id: str
    part: int
    parts: int
    kind: str
    state: AdapterState
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    blob_path: str
    checksum: str
    size_bytes: int
    base_fingerprint: str
    generator_fingerprint: str
    manifest: Mapping[str, Any]
    created_at: float
    retired_at: float | None
    deleted_at: float | None


@dataclass(frozen=True, slots=True)
class ChangeEvent:
    """One entry of a tenant's change log. `seq` counts from 1 without gaps, in commit order.

    | kind | adapter_id | retired_adapter_ids |
    |---|---|---|
    | adapter_published | the first of the new current adapters | those that they replace, if any |
    | adapter_superseded | the first of new adapters that did not become current | empty |
    | adapters_stale | None | the document's adapters that went stale |
    | centroids_added | the first of the document's adapters that have vectors of another encoder now | empty |
    | document_deleted | None | all of the document's |
    | document_rolled_back | the first of the adapters that are current again | those that they replace |
    | document_updated | the first current adapter, if any (collection or metadata changed) | empty |
    | policy_changed | None; `document_id` is empty, for it concerns none | empty |

    Applying an event: drop all entries of `document_id`, then put in what `routable(tenant, [document_id])` gives
    (nothing when the document is gone). Applying one twice, or an old one late, does no harm.
    """

    tenant_id: str
    seq: int
    kind: EventKind
    adapter_id: str | None
    document_id: str
    retired_adapter_ids: tuple[str, ...]
    created_at: float


@dataclass(frozen=True, slots=True, eq=False)
class RoutableAdapter:
    """A current adapter of a live document, with its centroids (float32 [centroids, dimension]).

    It covers the characters `spans` ([start, end), in order) of the text of the document's `version`; no spans: all of
    it. A document with several `parts` has one such adapter for each.
    """

    adapter_id: str
    tenant_id: str
    document_id: str
    document_title: str
    version: int
    mode: DocumentMode
    part: int
    parts: int
    spans: tuple[tuple[int, int], ...]
    collection_id: str | None
    centroids: npt.NDArray[np.float32]
    encoder: str
    encoder_version: str
    base_fingerprint: str
    generator_fingerprint: str
    state: AdapterState


@dataclass(frozen=True, slots=True)
class UnembeddedAdapter:
    """A current adapter of a live document that has no vectors of an encoder; fields as of `RoutableAdapter`."""

    adapter_id: str
    tenant_id: str
    document_id: str
    version: int
    part: int
    parts: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class RoutableSnapshot:
    """All of a tenant's routable adapters, at least as new as the change log at `seq`."""

    seq: int
    adapters: list[RoutableAdapter]


@dataclass(frozen=True, slots=True)
class Alias:
    """A tenant's own name for an adapter, document or collection."""

    tenant_id: str
    name: str
    target: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a client's `model` name stands for. `adapter_ids` is empty when the thing exists but nothing is ready yet.

    For a document it holds the current adapters of all parts, in order; for a collection those of all its documents.
    For an alias, `target` is what it names.
    """

    kind: ResolutionKind
    target: str
    adapter_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One version of a tenant's routing policy; `number` counts from 1. `created_by` is the ID of the key that made it,
    `restored_from` the version that it was rolled back to, None where the text was sent."""

    tenant_id: str
    number: int
    text: str = field(repr=False)
    created_by: str
    restored_from: int | None
    created_at: float


@dataclass(frozen=True, slots=True)
class DocumentFacts:
    """What a routing policy may ask about a live document. `collection` is a name, `posted_at` the time at which the
    version that is served was posted."""

    document_id: str
    external_id: str | None
    collection: str | None
    metadata: Mapping[str, Any]
    posted_at: float


@dataclass(frozen=True, slots=True)
class RecordedDecision:
    """A routing decision on one request. `text` is what was compared with documents; `headers` those that policies may
    look at, with names in lower case; `candidates` the fields of `router.decide.Candidate`."""

    response_id: str
    tenant_id: str
    created_at: float
    model: str
    text: str = field(repr=False)
    headers: Mapping[str, str]
    candidates: Sequence[Mapping[str, Any]]
    adapter_id: str | None
    document_id: str | None
    reason: str
    confidence: float | None


@dataclass(frozen=True, slots=True)
class NewFeedback:
    """What a client says about one response: at least one of its fields. `right_document_id` is the document that
    should have answered, `no_document` says that none should have, `answer` is what the answer should have been."""

    response_id: str
    rating: Rating | None = None
    right_document_id: str | None = None
    no_document: bool = False
    answer: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Feedback:
    """Feedback with what had been decided: who answered (None: the base), among which `candidates`."""

    tenant_id: str
    response_id: str
    created_at: float
    rating: Rating | None
    right_document_id: str | None
    no_document: bool
    answer: str | None = field(repr=False)
    candidates: Sequence[Mapping[str, Any]]
    adapter_id: str | None
    document_id: str | None


@dataclass(frozen=True, slots=True)
class StoredCalibration:
    """A tenant's calibration for one encoder and generator. `body` is `router.calibrate.Calibration.to_json()`.

    It was fitted to the tenant's documents as of change `seq` and to feedback given up to `feedback_until`. `version`
    and `created_at` are the registry's to set.
    """

    tenant_id: str
    stage: CalibrationStage
    encoder: str
    encoder_version: str
    generator_fingerprint: str
    seq: int
    feedback_until: float
    body: Mapping[str, Any] = field(repr=False)
    version: int = 0
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class AskedProbe:
    """A question that the quality gate asked an adapter, and whether the adapter answered right."""

    adapter_id: str
    document_id: str
    generator_fingerprint: str
    question: str = field(repr=False)
    right: bool
