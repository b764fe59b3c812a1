"""What a killed generator left is removed at the next start; what is published, young or foreign stays."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from serve.blobs import BlobStore
from serve.config import ImprintConfig
from serve.ids import new_id
from serve.launcher import sweep_leftovers
from serve.registry import Registry, migrate
from serve.registry.records import NewAdapter, NewCentroids
from serve.sweep import SAFE_AGE_S, sweep


@dataclass
class Store:
    """A registry and a blob store with one tenant."""

    config: ImprintConfig
    registry: Registry
    blobs: BlobStore
    tenant_id: str
    source: Path

    def put(self, tenant_id: str | None = None, age_s: float = 2 * SAFE_AGE_S, whole: bool = True) -> str:
        """An adapter's files of that age, as a generator uploads them; `whole` False: killed before the manifest."""
        prefix = f"adapters/{tenant_id or self.tenant_id}/{new_id('adp')}"
        self.blobs.put_folder(prefix, self.source)
        folder = self.config.data_dir / "blobs" / prefix
        if not whole:
            (folder / "imprint-manifest.json").unlink()
        age(folder, age_s)
        return prefix

    def publish(self, prefix: str) -> str:
        """Publish it; gives its document's ID."""
        posted = self.registry.post_document(self.tenant_id, prefix, "text")
        self.registry.lease_jobs("w", 1, 60)
        adapter = NewAdapter(
            prefix.rpartition("/")[2], "lora", 8, 8.0, ("down_proj",), prefix, "0" * 64, 10, "base", "generator"
        )
        centroids = NewCentroids("e", "1", np.ones((1, 2), np.float32))
        self.registry.publish(posted.job.id, "w", [(adapter, centroids)])
        return posted.document.id


def age(folder: Path, seconds: float) -> None:
    """Make everything in a folder look that old."""
    then = time.time() - seconds
    for place in (*folder.rglob("*"), folder):
        os.utime(place, (then, then))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    config = ImprintConfig(data_dir=tmp_path / "data")
    migrate(config.registry.url)
    registry = Registry.open(config.registry.url)
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_model.safetensors").write_bytes(b"weights")
    yield Store(config, registry, BlobStore.open(config.blobs.url), registry.create_tenant("acme").id, source)
    registry.close()


def test_uploaded_but_unpublished_adapters_go(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    whole, half = store.put(), store.put(whole=False)
    published, deleted = store.put(), store.put()
    store.publish(published)
    store.registry.delete_document(store.tenant_id, store.publish(deleted))
    young = store.put(age_s=SAFE_AGE_S / 2)
    foreign = store.put(tenant_id=new_id("ten"))
    assert sorted(sweep(store.config, store.registry, store.blobs)) == sorted([whole, half])
    left = {path.parent for path in (store.config.data_dir / "blobs").rglob("*.safetensors")}
    # A deleted adapter's files have an owner: the generator purges them once no request can name them.
    assert left == {store.config.data_dir / "blobs" / prefix for prefix in (published, deleted, young, foreign)}
    assert whole in caplog.text and half in caplog.text and published not in caplog.text
    assert sweep(store.config, store.registry, store.blobs) == []


def test_one_young_file_keeps_a_folder(store: Store) -> None:
    prefix = store.put()
    os.utime(store.config.data_dir / "blobs" / prefix / "adapter_model.safetensors")
    assert sweep(store.config, store.registry, store.blobs) == []


def test_staging_folders_go(store: Store) -> None:
    staging = store.config.staging_dir
    assert sweep(store.config, store.registry, store.blobs) == [], "there may be no staging folder yet"
    for name, seconds in (("adp_old-x", 2 * SAFE_AGE_S), ("adp_young-x", 10), ("mine", 2 * SAFE_AGE_S)):
        (staging / name).mkdir(parents=True)
        (staging / name / "file").touch()
        age(staging / name, seconds)
    assert sweep(store.config, store.registry, store.blobs) == [str(staging / "adp_old-x")]
    assert {place.name for place in staging.iterdir()} == {"adp_young-x", "mine"}


def test_the_launcher_sweeps_and_starts_even_if_it_cannot(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = store.put()
    sweep_leftovers(store.config, store.registry)
    assert store.blobs.list_folders(f"adapters/{store.tenant_id}") == [] and prefix in caplog.text

    def fail(*_: object) -> None:
        raise OSError("no route to the store")

    store.put()
    monkeypatch.setattr(BlobStore, "list_folders", fail)
    sweep_leftovers(store.config, store.registry)
    assert "could not be removed" in caplog.text and "no route to the store" in caplog.text
