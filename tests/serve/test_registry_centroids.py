"""Vectors of further encoders: who lacks them, and adding them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serve.registry import InvalidInput, Registry
from serve.registry.records import NewCentroids
from tests.serve.registry_helpers import (  # noqa: F401
    acme,
    centroids,
    clock,
    lease_one,
    make_ready,
    new_adapter,
    one_part,
    registry,
    several_parts,
    url,
)

# ruff: noqa: F811

OLD, NEW = ("minilm", "1"), ("another", "7")


def vectors(value: float = 2.0) -> NewCentroids:
    """Of the new encoder, which has another dimension."""
    return NewCentroids(*NEW, np.full((3, 5), value, np.float32))


def test_who_lacks_vectors_is_found_by_document(registry: Registry, acme: str) -> None:
    globex = registry.create_tenant("globex").id
    single, long = make_ready(registry, acme, "A"), make_ready(registry, acme, "B", parts=several_parts(3))
    theirs = make_ready(registry, globex, "C")
    assert registry.count_lacking(OLD) == 0 and not registry.lacks_any(OLD)
    assert registry.documents_lacking(OLD, "", 10) == registry.adapters_lacking(acme, long.document_id, OLD) == []
    assert registry.count_lacking(NEW) == 5 and registry.count_lacking(("minilm", "2")) == 5
    assert (registry.count_lacking(NEW, acme), registry.count_lacking(NEW, globex)) == (4, 1)
    assert registry.lacks_any(NEW) and registry.lacks_any(NEW, globex) and not registry.lacks_any(NEW, "ten_x")
    found = registry.documents_lacking(NEW, "", 10)
    ids = sorted([single.document_id, long.document_id, theirs.document_id])
    assert [document for _, document in found] == ids and dict((b, a) for a, b in found)[ids[2]] in (acme, globex)
    assert registry.documents_lacking(NEW, ids[0], 1) == found[1:2]
    lacking = registry.adapters_lacking(acme, long.document_id, NEW)
    assert [(one.part, one.parts, one.version, one.spans) for one in lacking] == [
        (part, 3, 1, ((4 * part, 4 * part + 4),)) for part in range(3)
    ]
    assert lacking[0].adapter_id == long.adapter_id
    assert registry.adapters_lacking(globex, long.document_id, NEW) == [], "of another tenant"


def test_added_vectors_are_one_change_and_stand_beside_the_others(registry: Registry, acme: str) -> None:
    long = make_ready(registry, acme, "B", parts=several_parts(2))
    adapters = [one.adapter_id for one in registry.adapters_lacking(acme, long.document_id, NEW)]
    event = registry.add_centroids(acme, long.document_id, [(name, vectors(i)) for i, name in enumerate(adapters)])
    assert event is not None and (event.kind, event.seq) == ("centroids_added", long.seq + 1)
    assert (event.document_id, event.adapter_id, event.retired_adapter_ids) == (long.document_id, adapters[0], ())
    assert registry.changes_since(acme, long.seq) == [event] and not registry.lacks_any(NEW)
    for encoder, dimension in ((OLD, 3), (NEW, 5)):
        found = registry.routable(acme, encoder=encoder)
        assert [one.adapter_id for one in found] == adapters
        assert {(one.encoder, one.encoder_version, one.centroids.shape[1]) for one in found} == {(*encoder, dimension)}
        snapshot = registry.routable_snapshot(acme, encoder)
        assert snapshot.seq == event.seq and len(snapshot.adapters) == 2
    assert registry.routable(acme, [long.document_id], NEW)[1].centroids[0, 0] == 1
    assert registry.routable(acme, encoder=("minilm", "2")) == []
    # Again, as by another worker that was slower: nothing happens.
    assert registry.add_centroids(acme, long.document_id, [(adapters[0], vectors(9.0))]) is None
    assert registry.head(acme) == event.seq and registry.routable(acme, encoder=NEW)[0].centroids[0, 0] == 0


def test_vectors_are_added_to_current_adapters_of_the_document_alone(registry: Registry, acme: str) -> None:
    globex = registry.create_tenant("globex").id
    first, other = make_ready(registry, acme, "A"), make_ready(registry, acme, "B")
    assert first.adapter_id is not None and other.adapter_id is not None
    for tenant, document, adapter in [
        (globex, first.document_id, first.adapter_id), (acme, "doc_x", first.adapter_id),
        (acme, first.document_id, other.adapter_id), (acme, first.document_id, "adp_x"),
    ]:  # fmt: skip
        assert registry.add_centroids(tenant, document, [(adapter, vectors())]) is None
    with pytest.raises(InvalidInput, match="finite"):
        registry.add_centroids(acme, first.document_id, [(first.adapter_id, vectors(np.nan))])
    second = make_ready(registry, acme, "A", "new text", document_id=first.document_id)
    assert registry.add_centroids(acme, first.document_id, [(first.adapter_id, vectors())]) is None, "retired"
    registry.delete_document(acme, other.document_id)
    assert registry.add_centroids(acme, other.document_id, [(other.adapter_id, vectors())]) is None, "deleted"
    assert [name for _, name in registry.documents_lacking(NEW, "", 10)] == [first.document_id]
    assert second.adapter_id is not None
    assert registry.add_centroids(acme, first.document_id, [(second.adapter_id, vectors())]) is not None
    # What a rollback serves again is found.
    assert not registry.lacks_any(NEW)
    registry.rollback_document(acme, first.document_id, 1)
    (lacking,) = registry.adapters_lacking(acme, first.document_id, NEW)
    assert (lacking.adapter_id, lacking.version) == (first.adapter_id, 1)


def test_deleted_documents_keep_no_vectors_of_any_encoder(registry: Registry, acme: str) -> None:
    event = make_ready(registry, acme, "A", parts=[(new_adapter(), centroids(), vectors())])
    assert not registry.lacks_any(NEW) and len(registry.routable(acme)) == 2
    registry.delete_document(acme, event.document_id)
    assert registry.routable(acme) == [] and not registry.lacks_any(NEW)


def test_all_or_none_of_an_adapters_vectors_are_published(registry: Registry, acme: str) -> None:
    posted = registry.post_document(acme, "A", "text")
    lease_one(registry)
    (adapter, good), = one_part()
    with pytest.raises(InvalidInput, match="finite"):
        registry.publish(posted.job.id, "w1", [(adapter, good, vectors(np.inf))])
    assert registry.routable(acme) == []
    registry.publish(posted.job.id, "w1", [(adapter, good, vectors(), replace(vectors(), version="8"))])
    assert {one.encoder_version for one in registry.routable(acme)} == {"1", "7", "8"}
