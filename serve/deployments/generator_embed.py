"""Documents embedded anew after the encoder was changed: while no document waits, a few at a time.

What lacks vectors of the configured encoder is found in the registry, so a worker that dies loses nothing, and several
workers share the work. Also a rollback to adapters of a former encoder is found so.
"""

from __future__ import annotations

import logging
import random
import threading
import time

from router.embed import Encoder
from serve.config import RouterConfig
from serve.deployments.generator_store import embedded
from serve.metrics import GeneratorMetrics
from serve.registry import Registry

logger = logging.getLogger(__name__)

BATCH = 32
"""Documents looked up at once. Fewer of them are embedded when a document comes meanwhile."""
LOOK_EVERY_S = 60.0
"""How often to look again when nothing, or nothing that can be embedded, is left."""
TELL_EVERY_S = 10.0


class EmbedAnew:
    """Gives adapters that lack them vectors of an encoder. For one thread."""

    def __init__(
        self,
        registry: Registry,
        encoder: Encoder,
        settings: RouterConfig,
        metrics: GeneratorMetrics,
        stop: threading.Event,
    ) -> None:
        """When `stop` is set, the document under way is the last one."""
        self._registry = registry
        self._encoder = encoder
        self._name = encoder.id, encoder.version
        self._settings = settings
        self._metrics = metrics
        self._stop = stop
        self._after = ""
        self._look_at = self._tell_at = 0.0
        self._begun = False

    def run_once(self) -> bool:
        """Embed some documents, unless one waits to be made an adapter of; False where there is nothing to do now."""
        if time.monotonic() < self._look_at:
            return False
        documents = self._registry.documents_lacking(self._name, self._after, BATCH)
        if not documents:
            # What failed is tried again at the next look.
            self._after, self._look_at = "", time.monotonic() + LOOK_EVERY_S
            self._tell(ended=True)
            return False
        self._begun = True
        after = documents[-1][1]
        random.shuffle(documents)  # so that workers who found the same seldom do the same
        for tenant_id, document_id in documents:
            if self._stop.is_set() or self._registry.generate_waits():
                return True
            self._embed(tenant_id, document_id)
            self._tell()
        self._after = after
        return True

    def _embed(self, tenant_id: str, document_id: str) -> None:
        """All parts of one document that lack vectors now."""
        lacking = self._registry.adapters_lacking(tenant_id, document_id, self._name)
        version = self._registry.get_version(tenant_id, document_id, lacking[0].version) if lacking else None
        if version is None:
            return  # another worker was faster, or the document has been deleted
        try:
            new = [
                (one.adapter_id, embedded(self._encoder, self._settings, version, one.spans, one.parts > 1))
                for one in lacking
            ]
        except ValueError as error:
            logger.error("document %s cannot be embedded with %s %s: %s", document_id, *self._name, error)
            return
        self._registry.add_centroids(tenant_id, document_id, new)

    def _tell(self, ended: bool = False) -> None:
        if not ended and time.monotonic() < self._tell_at:
            return
        self._tell_at = time.monotonic() + TELL_EVERY_S
        left = self._registry.count_lacking(self._name)
        self._metrics.embed_left.set(left)
        if self._begun:
            logger.info("%d adapters are left to be embedded with %s %s", left, *self._name)
        self._begun = self._begun and not ended
