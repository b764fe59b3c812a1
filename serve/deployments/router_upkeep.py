"""Upkeep of the tenants' indexes, on a thread of low priority: what is gone leaves their files in bounded time, and
tenants leave the previous encoder.

An entry that was deleted or replaced is out of every search at once. Out of the files it is within `PURGE_AFTER_S`:
this process writes segments that hold such entries anew after two fifths of that, where it has the tenant's index in
memory. Files that nobody looks after any more (of a tenant whose index was dropped, or that no replica was asked for,
or of a replica that is no more) are removed after three quarters, for the registry holds all that they do; so are, at
once, those of tenants that the registry does not know. The rest of the time is for the work itself. Replicas on one
machine share the folder, and each does this.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from router.storage import DiskState, IndexDamaged, disk_state, holds_any, remove_folder, remove_leftovers
from serve.deployments.router_index import TenantIndexes
from serve.niceness import step_back
from serve.registry import Registry
from serve.registry.records import ChangeEvent

logger = logging.getLogger(__name__)

PURGE_EVERY_S = 60.0
PURGE_AFTER_S = 600.0
"""As for adapters' blobs, see `serve.deployments.generator_worker`."""
_REWRITE_SHARE, _REMOVE_SHARE = 0.4, 0.75
_CHANGES_AT_ONCE = 1000


class IndexUpkeep:
    """Looks at all tenants' index files every `every_s` seconds, from `start` until `stop`."""

    def __init__(
        self,
        registry: Registry,
        indexes: TenantIndexes,
        folder: Path,
        every_s: float = PURGE_EVERY_S,
        after_s: float = PURGE_AFTER_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`folder` holds a folder for each tenant. `after_s`: how long files may hold what is gone, in seconds.
        `clock` gives seconds since the epoch."""
        self._registry = registry
        self._indexes = indexes
        self._folder = folder
        self._every_s = every_s
        self._after_s = after_s
        self._clock = clock
        self._stop = threading.Event()
        self._read: dict[str, tuple[DiskState, int]] = {}
        """By tenant, up to which change a state's files are known to hold nothing that is gone."""
        self._thread = threading.Thread(target=self._run, name="router-upkeep", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End before the next tenant."""
        self._stop.set()

    def run_once(self) -> None:
        """Look at every tenant once. One that fails is left for the next time."""
        folders = sorted(path for path in self._folder.glob("*") if path.is_dir())
        # Asked after the listing, so that a tenant that was made meanwhile is known.
        known = {tenant.id for tenant in self._registry.list_tenants()} if folders else set()
        self._read = {tenant: read for tenant, read in self._read.items() if tenant in known}
        for folder in folders:
            if folder.name in known:
                self._try(self._look_at, folder)
            else:
                logger.info("the index of %s is removed: there is no such tenant", folder.name)
                remove_folder(folder)
        until = time.monotonic() + self._every_s
        self._indexes.leave_previous(lambda: self._stop.is_set() or time.monotonic() > until)

    def _try(self, work: Callable[[Path], None], folder: Path) -> None:
        if self._stop.is_set():
            return
        try:
            work(folder)
        except IndexDamaged as error:
            logger.error("the files of the index of %s are removed: %s", folder.name, error)
            remove_folder(folder)
        except Exception:
            logger.exception("the files of the index of %s could not be looked at", folder.name)

    def _run(self) -> None:
        step_back()
        while not self._stop.wait(self._every_s):
            try:
                self.run_once()
            except Exception:
                # A registry that fails now may work again at the next turn.
                logger.exception("the indexes' files could not be looked at")

    def _look_at(self, folder: Path) -> None:
        tenant_id, now = folder.name, self._clock()
        due, late = now - _REWRITE_SHARE * self._after_s, now - _REMOVE_SHARE * self._after_s
        remove_leftovers(folder, due)
        index = self._indexes.followed_on(tenant_id)
        self._indexes.purge(tenant_id, due)
        state = disk_state(folder)
        if state is None:
            return
        if index is not None and index.committed == state.names and not index.holds_gone(late):
            return  # it knows what of its files is gone
        if self._holds_gone(folder, state, late):
            logger.info("the files of the index of %s hold what was deleted, and are removed", tenant_id)
            remove_folder(folder)

    def _holds_gone(self, folder: Path, state: DiskState, before: float) -> bool:
        """Whether files that no index of this process knows hold what went before this time."""
        if state.gone_since is not None and state.gone_since < before:
            return True
        tenant_id = folder.name
        known, seq = self._read.get(tenant_id, (state, state.seq))
        if known != state:
            seq = state.seq
        while changes := self._registry.changes_since(tenant_id, seq, _CHANGES_AT_ONCE):
            old = list(takewhile(lambda one: one.created_at < before, changes))
            if holds_any(folder, state, [name for one in old for name in _gone(one)]):
                return True
            seq = old[-1].seq if old else seq
            if len(old) < len(changes):
                break
        self._read[tenant_id] = state, seq
        return False


def _gone(change: ChangeEvent) -> tuple[str, ...]:
    """The adapters that a change took out of routing."""
    return () if change.kind == "adapters_stale" else change.retired_adapter_ids
