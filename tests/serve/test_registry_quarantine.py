"""An adapter whose files are lost: nobody is routed to it, and its document is generated again."""

from __future__ import annotations

from serve.registry import Registry
from tests.serve.registry_helpers import Clock, clock, make_ready, registry, url

__all__ = ["clock", "registry", "url"]


def publish(registry: Registry, tenant_id: str, title: str, text: str, document_id: str | None = None) -> str:
    """The ID of a new adapter."""
    adapter_id = make_ready(registry, tenant_id, title, text, document_id=document_id).adapter_id
    assert adapter_id is not None
    return adapter_id


def test_a_served_adapter_goes_stale_and_its_document_is_queued(registry: Registry, clock: Clock) -> None:
    tenant = registry.create_tenant("acme").id
    kept = publish(registry, tenant, "kept", "x")
    lost = publish(registry, tenant, "lost", "y")
    head = registry.head(tenant)
    assert [adapter.id for adapter in registry.newest_adapters(10)] == [lost, kept]
    assert registry.quarantine_adapter(tenant, lost)
    assert not registry.quarantine_adapter(tenant, lost), "once is enough"
    (event,) = registry.changes_since(tenant, head)
    assert (event.kind, event.retired_adapter_ids) == ("adapters_stale", (lost,))
    states = {adapter.adapter_id: adapter.state for adapter in registry.routable(tenant)}
    assert states == {kept: "ready", lost: "stale"}
    (leased,) = registry.lease_jobs("w", 5, 60)
    assert leased.version.text == "y" and leased.job.kind == "generate"
    assert registry.count_stale_pending() == 1


def test_a_job_under_way_is_enough(registry: Registry, clock: Clock) -> None:
    tenant = registry.create_tenant("acme").id
    lost = publish(registry, tenant, "lost", "y")
    adapter = registry.get_adapter(tenant, lost)
    assert adapter is not None
    posted = registry.post_document(tenant, "lost", "a new version", document_id=adapter.document_id)
    assert registry.quarantine_adapter(tenant, lost)
    (leased,) = registry.lease_jobs("w", 5, 60)
    assert leased.job.id == posted.job.id


def test_neither_strangers_nor_deleted_ones(registry: Registry, clock: Clock) -> None:
    tenant, other = (registry.create_tenant(name).id for name in ("acme", "other"))
    lost = publish(registry, tenant, "lost", "y")
    assert not registry.quarantine_adapter(other, lost)
    adapter = registry.get_adapter(tenant, lost)
    assert adapter is not None
    registry.delete_document(tenant, adapter.document_id)
    head = registry.head(tenant)
    assert not registry.quarantine_adapter(tenant, lost) and registry.head(tenant) == head
    assert registry.lease_jobs("w", 5, 60) == [] and registry.newest_adapters(10) == []


def test_a_retired_adapter_queues_nothing(registry: Registry, clock: Clock) -> None:
    tenant = registry.create_tenant("acme").id
    old = publish(registry, tenant, "doc", "one")
    adapter = registry.get_adapter(tenant, old)
    assert adapter is not None
    new = publish(registry, tenant, "doc", "two", document_id=adapter.document_id)
    assert registry.quarantine_adapter(tenant, old)
    assert registry.lease_jobs("w", 5, 60) == []
    assert [adapter.id for adapter in registry.newest_adapters(10)] == [new]
