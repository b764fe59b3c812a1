"""Many adapters in a stopped server's registry and blob store, without generating them.

They have the shape of the shipped pair's adapters (rank 16 on every `down_proj`) and small random weights. `POOL`
different ones are stored; each registered adapter has its own ID, document and row, and its files are hard links to
one of the pool, so that ten thousand take hardly more room than the pool. The node's cache copies what is used.
Their centroids are random: traffic names them, nothing is routed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from hypernet.fingerprint import fingerprint_folder
from hypernet.inject import module_path
from hypernet.lora import LoraAdapter
from router.embed import MiniLmEncoder
from serve.app import prepare
from serve.blobs import BlobStore, StoredFolder
from serve.config import ImprintConfig
from serve.ids import new_id
from serve.registry import Registry
from serve.registry.records import LeasedJob, NewAdapter, NewCentroids
from serve.tenants import TENANT_HEADER

POOL, RANK, BATCH = 64, 16, 100
SPREAD = 0.01  # of the weights: small against those of the base
SPARE_BYTES = 5 << 30  # free space that must be left, above what the node's cache may take
WORKER, LEASE_S = "benchmark", 600.0


@dataclass(frozen=True)
class RegisteredAdapter:
    """An adapter and the name of its tenant."""

    id: str
    tenant: str

    @property
    def headers(self) -> dict[str, str]:
        """What a request with the service key needs besides."""
        return {TENANT_HEADER: self.tenant}


@dataclass(frozen=True)
class Registered:
    """What was registered, in order, and keys: `service_key` acts for all tenants."""

    adapters: list[RegisteredAdapter]
    service_key: str
    admin_key: str


def register(data_dir: Path, count: int, tenants: int = 100, seed: int = 5) -> Registered:
    """Register `count` adapters in turn for `tenants` tenants, with the server of this data folder stopped or new.

    Raises OSError where the disk has too little room.
    """
    config = ImprintConfig(data_dir=data_dir)
    prepare(config)
    free = shutil.disk_usage(data_dir).free
    if free < config.engine.cache_bytes + SPARE_BYTES:
        raise OSError(f"{free >> 30} GiB are free; {(config.engine.cache_bytes + SPARE_BYTES) >> 30} GiB are needed")
    pool = _Pool(data_dir.parent / "pool", data_dir / "blobs", config.base_folder(), seed)
    registry = Registry.open(config.registry.url)
    try:
        names = {registry.create_tenant(name).id: name for name in (f"bench-{i:03}" for i in range(tenants))}
        writer = _Writer(registry, pool, config, np.random.default_rng(seed))
        for begin in track(range(0, count, BATCH), description=f"Registering {count} adapters"):
            writer.batch(list(names), begin, min(begin + BATCH, count))
        _, service_key = registry.create_key(None, "service", "benchmark", list(names.values()))
        _, admin_key = registry.create_key(None, "admin", "benchmark")
    finally:
        registry.close()
    adapters = [RegisteredAdapter(adapter_id, names[tenant]) for tenant, adapter_id in writer.written]
    return Registered(adapters, service_key, admin_key)


class _Pool:
    """Different adapters in a blob store of their own, to be linked from."""

    def __init__(self, folder: Path, target: Path, base: Path, seed: int) -> None:
        self._root, self._target = folder / "stored", target
        store = BlobStore.open(f"file://{self._root}")
        generator = torch.Generator().manual_seed(seed)
        shape = json.loads((base / "config.json").read_text())
        self.stored: list[StoredFolder] = []
        for number in range(POOL):
            staged = folder / "staged"
            self.lora = random_lora(shape, generator)
            self.lora.save(staged)
            self.stored.append(store.put_folder(f"pool-{number:02}", staged))
            shutil.rmtree(staged)

    def link(self, number: int, prefix: str) -> StoredFolder:
        """The pool's adapter `number`, also under `prefix` in the server's store."""
        stored = self.stored[number % POOL]
        folder = self._target / prefix
        folder.mkdir(parents=True)
        for file in (self._root / stored.prefix).iterdir():
            os.link(file, folder / file.name)
        return StoredFolder(prefix, stored.checksum, stored.size_bytes)


class _Writer:
    """Writes documents and adapters through the registry's own methods."""

    def __init__(self, registry: Registry, pool: _Pool, config: ImprintConfig, random: np.random.Generator) -> None:
        self._registry, self._pool, self._random = registry, pool, random
        # As the server's generator says it, or they would be stale at its start.
        self._base = fingerprint_folder(config.base_folder())
        self._generator = fingerprint_folder(config.checkpoint_path())
        self._encoder = MiniLmEncoder.load(config.router.encoder, threads=1)
        self.written: list[tuple[str, str]] = []
        """Tenant and adapter IDs."""

    def batch(self, tenants: list[str], begin: int, end: int) -> None:
        """Post, lease and publish the numbers from `begin` to before `end`."""
        order: dict[str, int] = {}
        for number in range(begin, end):
            text = f"Depot {number} keeps {number + 17} crates. Its warden is warden {number}."
            posted = self._registry.post_document(tenants[number % len(tenants)], f"Depot {number}", text)
            order[posted.job.id] = number
        leased = self._registry.lease_jobs(WORKER, len(order), LEASE_S)
        if {item.job.id for item in leased} != set(order):
            raise RuntimeError("other jobs wait in this registry, or a server runs with it")
        for item in sorted(leased, key=lambda item: order[item.job.id]):
            self._publish(item, order[item.job.id])

    def _publish(self, item: LeasedJob, number: int) -> None:
        adapter_id = new_id("adp")
        stored = self._pool.link(number, f"adapters/{item.job.tenant_id}/{adapter_id}")
        lora = self._pool.lora
        new = NewAdapter(
            adapter_id, "lora", lora.rank, lora.alpha, lora.target_modules, stored.prefix, stored.checksum,
            stored.size_bytes, self._base, self._generator,
        )  # fmt: skip
        vector = self._random.standard_normal((1, self._encoder.dimension)).astype(np.float32)
        centroid = NewCentroids(self._encoder.id, self._encoder.version, vector / np.linalg.norm(vector))
        self._registry.publish(item.job.id, WORKER, [(new, centroid)])
        self.written.append((item.job.tenant_id, adapter_id))


def random_lora(shape: dict[str, int], generator: torch.Generator) -> LoraAdapter:
    """Random factors for every `down_proj` of a base with this `config.json`."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    tensors = {
        module_path(layer, "down_proj"): (
            SPREAD * torch.randn(RANK, inner, generator=generator),
            SPREAD * torch.randn(hidden, RANK, generator=generator),
        )
        for layer in range(layers)
    }
    return LoraAdapter(RANK, float(RANK), tensors, "random")
