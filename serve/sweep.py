"""Removes what a killed generator left behind: adapters that were written but never published.

A generator writes an adapter to its staging folder, then to the blob store, then publishes it, and cleans up when one
of these steps fails. When the process is killed nobody does, and nothing can name what lies there. So the launcher
looks once, before the application starts.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from serve.blobs import BlobMissing, BlobStore
from serve.config import ImprintConfig
from serve.ids import id_kind
from serve.registry import Registry

logger = logging.getLogger(__name__)

# Between its first file and its publication an adapter takes seconds. Younger things may belong to a generator at work.
SAFE_AGE_S = 3600.0


def sweep(config: ImprintConfig, registry: Registry, blobs: BlobStore) -> list[str]:
    """Remove all leftovers older than `SAFE_AGE_S`; returns their places: blob prefixes and staging folders."""
    before = time.time() - SAFE_AGE_S
    swept = [*sweep_blobs(registry, blobs, before), *sweep_staging(config.staging_dir, before)]
    for place in swept:
        logger.warning("removed %s: a generator was killed before it published this adapter", place)
    return swept


def sweep_blobs(registry: Registry, blobs: BlobStore, before: float) -> list[str]:
    """Remove adapters last written before this time that the registry has never heard of; returns their prefixes.

    Only of tenants that the registry knows: if it is pointed at another registry's blobs, those stay.
    """
    swept = []
    for tenant in registry.list_tenants():
        parent = f"adapters/{tenant.id}"
        names = {name for name in blobs.list_folders(parent) if id_kind(name) == "adp"}
        # Asked after the listing: what was published meanwhile is known.
        for name in sorted(names - registry.known_adapters(names)):
            prefix = f"{parent}/{name}"
            try:
                old = blobs.last_written(prefix) < before
            except BlobMissing:
                continue  # its generator has cleaned up after all
            if old:
                blobs.delete_folder(prefix)
                swept.append(prefix)
    return swept


def sweep_staging(folder: Path, before: float) -> list[str]:
    """Remove a generator's working folders that were last written before this time; returns their paths."""
    if not folder.is_dir():
        return []
    swept = []
    for place in sorted(folder.iterdir()):
        if place.name.startswith("adp_") and _last_written(place) < before:
            shutil.rmtree(place)
            swept.append(str(place))
    return swept


def _last_written(folder: Path) -> float:
    return max(place.stat().st_mtime for place in (folder, *folder.rglob("*")))
