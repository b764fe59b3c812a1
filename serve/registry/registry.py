"""The one object through which the application reads and writes metadata.

Calls are synchronous; from async code use `anyio.to_thread.run_sync`. A Registry may be shared by threads. Each
method is one transaction: when it returns, its effect is durable; when it raises, nothing happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property, partial
from typing import Any

from sqlalchemy import Connection

from serve.registry import (
    adapters,
    aliases,
    calibrations,
    centroids,
    changes,
    decisions,
    documents,
    feedback,
    jobs,
    keys,
    policies,
    posting,
    publishing,
    quarantine,
    stale,
    versions,
)
from serve.registry.database import Database
from serve.registry.errors import LeaseLost
from serve.registry.read_cache import ReadCache
from serve.registry.records import (
    Adapter,
    Alias,
    ApiKey,
    AskedProbe,
    CalibrationStage,
    ChangeEvent,
    Collection,
    Document,
    DocumentFacts,
    DocumentMode,
    DocumentVersion,
    Feedback,
    Job,
    JobKind,
    LeasedJob,
    NewCentroids,
    NewFeedback,
    NewPart,
    Page,
    PolicyVersion,
    PostResult,
    Principal,
    RecordedDecision,
    Resolution,
    Rollback,
    RoutableAdapter,
    RoutableSnapshot,
    Scope,
    StoredCalibration,
    Tenant,
    UnembeddedAdapter,
    VersionSummary,
)


class Registry:
    """Tenants, keys, documents, jobs, adapters and the change log, over SQLite or PostgreSQL."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since the epoch; leases of several machines need clocks that agree to a second."""
        self._db = database
        self._clock = clock

    @classmethod
    def open(cls, url: str, clock: Callable[[], float] = time.time) -> Registry:
        """Connect to a migrated database. Raises RegistryNotMigrated; see `serve.registry.migrate`."""
        database = Database(url)
        try:
            database.verify()
        except BaseException:
            database.close()
            raise
        return cls(database, clock)

    @cached_property
    def reads(self) -> ReadCache:
        """Results of reads, kept while nothing is committed. For the event loop's thread."""
        return ReadCache(self._db.sqlite_path)

    def close(self) -> None:
        """Close all connections. The object is of no use afterwards."""
        if "reads" in self.__dict__:
            self.reads.close()
        self._db.close()

    # Tenants and keys

    def create_tenant(self, name: str) -> Tenant:
        """Get the tenant of this name, made now if there was none. Raises InvalidInput for a bad name."""
        return self._db.write(lambda c: keys.create_tenant(c, self._clock(), name))

    def get_tenant(self, name_or_id: str) -> Tenant | None:
        """Look a tenant up by `ten_…` ID or name."""
        return self._db.read(lambda c: keys.get_tenant(c, name_or_id))

    def list_tenants(self) -> list[Tenant]:
        """All tenants, by name."""
        return self._db.read(keys.list_tenants)

    def create_key(
        self, tenant_id: str | None, scope: Scope, label: str = "", tenants: Sequence[str] = ()
    ) -> tuple[ApiKey, str]:
        """Make a key; the second value is its text, which is not stored and cannot be had again.

        A tenant key takes `tenant_id`, a service key `tenants`, an admin key neither; tenants are named by ID or name.
        Raises NotFound for an unknown tenant, InvalidInput for a combination that makes no sense.
        """
        return self._db.write(lambda c: keys.create_key(c, self._clock(), tenant_id, scope, label, tenants))

    def list_keys(self, tenant_id: str | None = None) -> list[ApiKey]:
        """All keys, revoked ones too, newest first; with `tenant_id` those that may act for that tenant."""
        return self._db.read(lambda c: keys.list_keys(c, tenant_id))

    def revoke_key(self, key_id: str) -> ApiKey | None:
        """Revoke at once and for good; None when there is no such key."""
        return self._db.write(lambda c: keys.revoke_key(c, self._clock(), key_id))

    def authenticate(self, secret: str) -> Principal | None:
        """Who holds this key text; None for anything that is not a valid, unrevoked key."""
        return self._db.read(lambda c: keys.authenticate(c, secret))

    # Documents and collections

    def post_document(
        self,
        tenant_id: str,
        title: str,
        text: str,
        external_id: str | None = None,
        collection: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        document_id: str | None = None,
        idempotency_key: str | None = None,
        mode: DocumentMode = "document",
        probes: Sequence[Mapping[str, str | None]] = (),
    ) -> PostResult:
        """Store a document version and queue its job, in one transaction.

        In mode "task" the text describes a task. `probes` (at most 32 mappings of `question` and, if known, `answer`)
        are what the quality gate asks. `document_id`, or an `external_id` that is known, adds a version to that
        document, unless the one to be served has the same content: title, text, mode and probes. With neither, the same
        content in the same collection gives the document that has it. Content whose job failed gets a new job
        (`created` is True then). `collection` (a name, made on first mention) and `metadata` are properties of the
        document; None leaves them as they are.
        Raises NotFound (tenant, document_id), Conflict, IdempotencyConflict, InvalidInput.
        """
        post = posting.Post(
            title, text, external_id, collection, metadata, document_id, idempotency_key, mode, tuple(probes)
        )
        return self._db.write(lambda c: posting.post_document(c, self._clock(), tenant_id, post))

    def get_document(self, tenant_id: str, id_or_external_id: str) -> Document | None:
        """A live document by `doc_…` ID or external ID."""
        return self._db.read(lambda c: documents.get_document(c, tenant_id, id_or_external_id))

    def get_version(self, tenant_id: str, document_id: str, number: int | None = None) -> DocumentVersion | None:
        """A live document's version with its text; the one that is to be served when no number is given."""
        return self._db.read(lambda c: documents.get_version(c, tenant_id, document_id, number))

    def list_versions(
        self, tenant_id: str, document_id: str, limit: int = 50, cursor: str | None = None
    ) -> Page[VersionSummary]:
        """A live document's versions, newest first. Raises InvalidInput for a cursor that no page gave."""
        return self._db.read(lambda c: versions.list_versions(c, tenant_id, document_id, limit, cursor))

    def rollback_document(self, tenant_id: str, id_or_external_id: str, version: int | None = None) -> Rollback:
        """Make `version` the one that is served; by default the newest before the wanted one that can be at once.

        The adapters that it had last become current again, in one transaction (event `document_rolled_back`). Where
        they are stale or were never made, a generate job for it is queued, unless one waits or runs, and what is
        served now stays until that is ready. Queued generate jobs of later versions and all refine jobs are ended;
        a job that runs for another version publishes without becoming current. A version posted afterwards gets a
        number above all others. Where the version is served already nothing happens.
        Raises NotFound, VersionNotFound, and Conflict when there is no version to go back to by default.
        """
        return self._db.write(lambda c: versions.rollback(c, self._clock(), tenant_id, id_or_external_id, version))

    def list_documents(
        self, tenant_id: str, limit: int = 50, cursor: str | None = None, collection_id: str | None = None
    ) -> Page[Document]:
        """Live documents, newest first. Raises InvalidInput for a cursor that no page gave."""
        return self._db.read(lambda c: documents.list_documents(c, tenant_id, limit, cursor, collection_id))

    def delete_document(self, tenant_id: str, id_or_external_id: str) -> ChangeEvent | None:
        """Remove a document's text, title, metadata and centroids for good, end its jobs, mark its adapters deleted.

        None when there is no such document. Blobs are purged later: see `list_purgeable`.
        """
        return self._db.write(lambda c: documents.delete_document(c, self._clock(), tenant_id, id_or_external_id))

    def list_collections(self, tenant_id: str) -> list[Collection]:
        """A tenant's collections, by name."""
        return self._db.read(lambda c: documents.list_collections(c, tenant_id))

    # Jobs

    def lease_jobs(self, worker: str, limit: int, lease_s: float) -> list[LeasedJob]:
        """Take up to `limit` jobs: queued ones and those whose lease ran out, fair over tenants.

        The tenant with the fewest running jobs goes first, then the one that was served longest ago. `worker` must be
        unique to this run of this process. A job is started at most `jobs.MAX_ATTEMPTS` times, then fails.
        Refine jobs come only when no generate job is free, and one at a time; no batch holds both kinds.
        """
        if not self._db.read(lambda c: jobs.work_waits(c, self._clock())):
            return []  # an idle poll must not take the write lock
        return self._db.write(lambda c: jobs.lease_jobs(c, self._clock(), worker, limit, lease_s))

    def renew_lease(self, job_id: str, worker: str, lease_s: float) -> None:
        """Hold the job for `lease_s` seconds from now. Raises LeaseLost when another worker has it or it ended."""
        self._db.write(lambda c: jobs.renew_lease(c, self._clock(), job_id, worker, lease_s))

    def release_leases(self, worker: str) -> int:
        """Queue again all jobs of a worker that stops in order; these starts do not count as attempts."""
        return self._db.write(lambda c: jobs.release_leases(c, self._clock(), worker))

    def set_job_progress(self, job_id: str, worker: str, stage: str, fraction: float) -> None:
        """Record how far a job is (0..1). Raises LeaseLost."""
        self._db.write(lambda c: jobs.set_progress(c, self._clock(), job_id, worker, stage, fraction))

    def fail_job(self, job_id: str, worker: str, error: str, retry: bool = False) -> Job:
        """End a job with an error, or with `retry` queue it again after a growing pause while attempts are left.

        Raises LeaseLost.
        """
        return self._db.write(lambda c: jobs.fail_job(c, self._clock(), job_id, worker, error, retry))

    def finish_job(self, job_id: str, worker: str, note: str) -> Job:
        """End a job as succeeded without a new adapter: a refinement that was no better. `note` says why.

        Raises LeaseLost.
        """
        return self._db.write(lambda c: jobs.finish_job(c, self._clock(), job_id, worker, note))

    def generate_waits(self) -> bool:
        """Whether a generate job is free now: a refinement under way should make room for it."""
        return self._db.read(lambda c: jobs.work_waits(c, self._clock(), "generate"))

    def get_job(self, tenant_id: str, job_id: str) -> Job | None:
        """A job by ID."""
        return self._db.read(lambda c: jobs.get_job(c, tenant_id, job_id))

    def count_jobs(self, kind: JobKind | None = None) -> dict[str, int]:
        """Number of jobs of all tenants in each state, of one kind or all, for metrics."""
        return self._db.read(lambda c: jobs.count_jobs(c, kind))

    # Publication, adapters, change log

    def publish(
        self,
        job_id: str,
        worker: str,
        parts: Sequence[NewPart],
        *,
        refine_after_s: float | None = None,
        expected_adapter_ids: Sequence[str] | None = None,
    ) -> ChangeEvent:
        """Make the adapters of all parts of a document visible, in one transaction, and end their job.

        They become the document's current adapters, in place of all that it had, when their version is the one that
        is to be served (event `adapter_published`), else they are kept as retired (`adapter_superseded`). With
        `refine_after_s` a refine job for the version is queued as well, free after that many seconds. A lease that ran
        out but that nobody took is still good.

        A refine job must say with `expected_adapter_ids` from which current adapters it started (in order of part).
        When others are current by now, nothing is published, the job is ended, and LeaseLost is raised.
        Raises LeaseLost, too, when the job is not this worker's any more, also after the document's deletion, and
        InvalidInput for parts that are not numbered 0, 1, … in order.
        """
        event = self._db.write(
            lambda c: publishing.publish(
                c,
                self._clock(),
                job_id,
                worker,
                parts,
                refine_after_s=refine_after_s,
                expected_adapter_ids=expected_adapter_ids,
            )
        )
        if event is None:
            raise LeaseLost(f"Job {job_id} started from adapters that are no longer current.")
        return event

    def get_adapter(self, tenant_id: str, adapter_id: str) -> Adapter | None:
        """An adapter by ID, retired and stale ones too, deleted ones not."""
        return self._db.read(lambda c: adapters.get_adapter(c, tenant_id, adapter_id))

    def list_adapters(
        self, tenant_id: str, limit: int = 50, cursor: str | None = None, document_id: str | None = None
    ) -> Page[Adapter]:
        """Adapters that are not deleted, newest first."""
        return self._db.read(lambda c: adapters.list_adapters(c, tenant_id, limit, cursor, document_id))

    def current_adapters_of(self, tenant_id: str, document_id: str) -> list[Adapter]:
        """A document's current adapters in order of part; empty for one that has none or does not exist."""
        return self._db.read(lambda c: adapters.current_adapters_of(c, tenant_id, document_id))

    def list_purgeable(self, deleted_before: float, limit: int = 100) -> list[Adapter]:
        """Adapters of all tenants that were deleted before this time and whose blobs may still be there."""
        return self._db.read(lambda c: adapters.list_purgeable(c, deleted_before, limit))

    def mark_purged(self, adapter_id: str) -> None:
        """Note that a deleted adapter's blobs are gone."""
        self._db.write(lambda c: adapters.mark_purged(c, self._clock(), adapter_id))

    def known_adapters(self, adapter_ids: Set[str]) -> set[str]:
        """Those of these adapters, of any tenant, that were ever published, deleted ones too."""
        return self._db.read(lambda c: adapters.known_adapters(c, adapter_ids))

    def current_adapters(self, adapter_ids: Set[str]) -> set[str]:
        """Those of these adapters, of any tenant, that are current for their document."""
        return self._db.read(lambda c: adapters.current_adapters(c, adapter_ids))

    def newest_adapters(self, limit: int) -> list[Adapter]:
        """The adapters, of any tenant, that were made last and are current, the newest first."""
        return self._db.read(lambda c: adapters.newest_adapters(c, limit))

    def quarantine_adapter(self, tenant_id: str, adapter_id: str) -> bool:
        """Mark an adapter whose files are lost or damaged as stale and queue its document again (event
        `adapters_stale`). False when it was neither ready nor degraded."""
        return self._db.write(lambda c: quarantine.quarantine_adapter(c, self._clock(), tenant_id, adapter_id))

    def head(self, tenant_id: str) -> int:
        """The number of the tenant's newest change; 0 when there is none."""
        return self._db.read(lambda c: changes.head(c, tenant_id))

    def changes_since(self, tenant_id: str, seq: int, limit: int = 1000) -> list[ChangeEvent]:
        """The tenant's changes after `seq`, oldest first, at most `limit`."""
        return self._db.read(lambda c: changes.changes_since(c, tenant_id, seq, limit))

    def routable(
        self, tenant_id: str, document_ids: Sequence[str] | None = None, encoder: tuple[str, str] | None = None
    ) -> list[RoutableAdapter]:
        """Current adapters, all parts, of live documents in any state but deleted: of all or of `document_ids`.

        `encoder` (ID, version): those that have vectors of it, with these. Without it an adapter is there once for
        each encoder.
        """
        return self._db.read(lambda c: adapters.routable(c, tenant_id, document_ids, encoder))

    def routable_snapshot(self, tenant_id: str, encoder: tuple[str, str] | None = None) -> RoutableSnapshot:
        """`routable` with the change number from which to follow on."""
        return self._db.read(lambda c: adapters.routable_snapshot(c, tenant_id, encoder))

    def count_lacking(self, encoder: tuple[str, str], tenant_id: str | None = None) -> int:
        """How many current adapters, of one tenant or all, have no vectors of an encoder (ID, version)."""
        return self._db.read(lambda c: centroids.count_lacking(c, *encoder, tenant_id))

    def lacks_any(self, encoder: tuple[str, str], tenant_id: str | None = None) -> bool:
        """Whether `count_lacking` is more than 0."""
        return self._db.read(lambda c: centroids.lacks_any(c, *encoder, tenant_id))

    def documents_lacking(self, encoder: tuple[str, str], after: str, limit: int) -> list[tuple[str, str]]:
        """(tenant, document) IDs of those with adapters that `count_lacking` counts, by document, after `after`."""
        return self._db.read(lambda c: centroids.documents_lacking(c, *encoder, after, limit))

    def adapters_lacking(self, tenant_id: str, document_id: str, encoder: tuple[str, str]) -> list[UnembeddedAdapter]:
        """A document's adapters that `count_lacking` counts, in order of part."""
        return self._db.read(lambda c: centroids.adapters_lacking(c, tenant_id, document_id, *encoder))

    def add_centroids(
        self, tenant_id: str, document_id: str, new: Sequence[tuple[str, NewCentroids]]
    ) -> ChangeEvent | None:
        """Give adapters of a document, by ID, vectors of a further encoder, in one transaction (event
        `centroids_added`).

        Adapters that have such vectors by now, or are not current any more, are left alone; None where that are all.
        Raises InvalidInput for vectors that are not finite or not [n, d].
        """
        return self._db.write(lambda c: centroids.add_centroids(c, self._clock(), tenant_id, document_id, new))

    def mark_stale(self, base_fingerprint: str, generator_fingerprint: str) -> int:
        """Mark adapters of any other base or generator stale and queue their documents again; returns how many.

        One transaction for each tenant. Calling it again queues nothing twice.
        """
        tenants = self._db.read(lambda c: stale.tenants_to_mark(c, base_fingerprint, generator_fingerprint))
        return sum(
            self._db.write(partial(self._mark_tenant, tenant, base_fingerprint, generator_fingerprint))
            for tenant in tenants
        )

    def _mark_tenant(self, tenant: str, base: str, generator: str, connection: Connection) -> int:
        return stale.mark_stale(connection, self._clock(), tenant, base, generator)

    def count_stale_pending(self) -> int:
        """Documents of all tenants that still wait for a new adapter in place of a stale one."""
        return self._db.read(stale.count_pending)

    # Decisions, feedback, calibrations

    def record_decisions(self, rows: Sequence[RecordedDecision], kept: int = decisions.KEPT) -> None:
        """Store a batch of routing decisions; of each tenant the newest `kept` stay. Titles are not stored."""
        self._db.write(lambda c: decisions.record(c, rows, kept))

    def recent_decisions(self, tenant_id: str, limit: int) -> list[RecordedDecision]:
        """A tenant's newest decisions first, candidates with their documents' present titles (empty: deleted)."""
        return self._db.read(lambda c: decisions.recent(c, tenant_id, limit))

    def get_decision(self, tenant_id: str, response_id: str) -> RecordedDecision | None:
        """The decision on one of the tenant's responses."""
        return self._db.read(lambda c: decisions.get(c, tenant_id, response_id))

    def give_feedback(self, tenant_id: str, given: NewFeedback) -> Feedback:
        """Store what a client says about a response, in place of what it said before.

        Raises NotFound for a response that has no decision (any more) and for a document that is not there,
        InvalidInput for feedback that says nothing or contradicts itself.
        """
        return self._db.write(lambda c: feedback.give(c, self._clock(), tenant_id, given))

    def feedback_since(self, tenant_id: str, after: float = 0.0, limit: int = 1000) -> list[Feedback]:
        """A tenant's feedback given after a time (seconds since the epoch), oldest first."""
        return self._db.read(lambda c: feedback.feedback_since(c, tenant_id, after, limit))

    def newest_feedback(self, tenant_ids: Sequence[str]) -> dict[str, float]:
        """Tenant -> time of its newest feedback; tenants without any are left out."""
        return self._db.read(lambda c: feedback.newest_feedback(c, tenant_ids))

    def store_calibration(self, new: StoredCalibration, expected_version: int) -> StoredCalibration | None:
        """Add a calibration in its stage ("live" or "shadow"), in place of the one there.

        None where the tenant's newest version is not `expected_version`: another process was faster.
        """
        return self._db.write(lambda c: calibrations.store(c, self._clock(), new, expected_version))

    def promote_calibration(self, tenant_id: str, version: int) -> bool:
        """Make the shadow of this version live; False where it is a shadow no more."""
        return self._db.write(lambda c: calibrations.promote(c, tenant_id, version))

    def retire_shadow(self, tenant_id: str, version: int) -> None:
        """End the shadow of this version."""
        self._db.write(lambda c: calibrations.retire_shadow(c, tenant_id, version))

    def calibrations(self, tenant_ids: Sequence[str], stage: CalibrationStage = "live") -> dict[str, StoredCalibration]:
        """Tenant -> its calibration in a stage; tenants without one are left out."""
        return self._db.read(lambda c: calibrations.in_stage(c, tenant_ids, stage))

    def newest_calibration_version(self, tenant_id: str) -> int:
        """0 where the tenant never had one."""
        return self._db.read(lambda c: calibrations.newest_version(c, tenant_id))

    def heads(self, tenant_ids: Sequence[str]) -> Mapping[str, int]:
        """`head` of several tenants at once; those without changes may be left out."""
        return self._db.read(lambda c: calibrations.heads(c, tenant_ids))

    def asked_probes(self, tenant_id: str) -> list[AskedProbe]:
        """What the quality gate asked the tenant's current, ready adapters, by document and part."""
        return self._db.read(lambda c: calibrations.asked_probes(c, tenant_id))

    # Names

    def resolve_model(self, tenant_id: str, name: str) -> Resolution | None:
        """What an adapter, document or collection ID, or an alias, stands for in this tenant; None if nothing."""
        return self._db.read(lambda c: aliases.resolve_model(c, tenant_id, name))

    def set_alias(self, tenant_id: str, name: str, target: str) -> Alias:
        """Point an alias at an adapter, document or collection ID. Raises InvalidInput, NotFound."""
        return self._db.write(lambda c: aliases.set_alias(c, self._clock(), tenant_id, name, target))

    def list_aliases(self, tenant_id: str) -> list[Alias]:
        """A tenant's aliases, by name."""
        return self._db.read(lambda c: aliases.list_aliases(c, tenant_id))

    def delete_alias(self, tenant_id: str, name: str) -> bool:
        """Remove an alias; False when there was none."""
        return self._db.write(lambda c: aliases.delete_alias(c, tenant_id, name))

    # Routing policies

    def current_policy(self, tenant_id: str) -> PolicyVersion | None:
        """The version in force; None for a tenant that never had a policy."""
        return self._db.read(lambda c: policies.current_policy(c, tenant_id))

    def get_policy(self, tenant_id: str, number: int) -> PolicyVersion | None:
        """A version by number."""
        return self._db.read(lambda c: policies.get_policy(c, tenant_id, number))

    def list_policies(self, tenant_id: str, limit: int = 50, cursor: str | None = None) -> Page[PolicyVersion]:
        """All versions, newest first. Raises InvalidInput for a cursor that no page gave."""
        return self._db.read(lambda c: policies.list_policies(c, tenant_id, limit, cursor))

    def put_policy(
        self, tenant_id: str, text: str, created_by: str, expected_version: int | None = None
    ) -> PolicyVersion:
        """Put a text that was checked in force as a new version (event `policy_changed`), in one transaction.

        Where the version in force has this text, it is returned and nothing happens. Raises Conflict when
        `expected_version` (0: none) is not the one in force, NotFound for an unknown tenant, InvalidInput for text that
        cannot be stored.
        """
        return self._db.write(
            lambda c: policies.put_policy(c, self._clock(), tenant_id, text, created_by, expected_version)
        )

    def rollback_policy(self, tenant_id: str, number: int | None, created_by: str) -> PolicyVersion:
        """Put the text of version `number`, by default the one before, in force again as a new version.

        Raises NotFound without a policy, VersionNotFound, and Conflict when there is none to go back to by default.
        """
        return self._db.write(lambda c: policies.roll_back_policy(c, self._clock(), tenant_id, number, created_by))

    def document_facts(self, tenant_id: str, document_ids: Sequence[str]) -> list[DocumentFacts]:
        """What routing policies may ask about those of these documents that are live and served."""
        return self._db.read(lambda c: policies.document_facts(c, tenant_id, document_ids))
