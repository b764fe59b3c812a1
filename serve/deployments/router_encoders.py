"""The encoder that questions are compared with, and the one before it while tenants still need that."""

from __future__ import annotations

import logging
import threading

from router.embed import Encoder, MiniLmEncoder, encoder_name
from router.index import TenantIndex

logger = logging.getLogger(__name__)

Name = tuple[str, str]
"""An encoder's ID and version."""


class PreviousEncoder:
    """The encoder of `router.previous_encoder`: its name at once, the encoder itself when it is first needed. May be
    shared by threads."""

    def __init__(self, encoder: str, cache_size: int = 10_000) -> None:
        """`encoder` as in `MiniLmEncoder.load`. Raises FileNotFoundError where its files are missing."""
        self.name = encoder_name(encoder)
        self._encoder = encoder
        self._cache_size = cache_size
        self._loaded: MiniLmEncoder | None = None
        self._lock = threading.Lock()

    def get(self) -> MiniLmEncoder:
        """The encoder, loaded now if it is not (a second or two). Raises OSError."""
        with self._lock:
            if self._loaded is None:
                logger.info("the encoder %s %s is loaded, for tenants whose documents are embedded anew", *self.name)
                self._loaded = MiniLmEncoder.load(self._encoder, cache_size=self._cache_size)
            return self._loaded

    def let_go(self) -> None:
        """Free its memory, until it is needed again."""
        with self._lock:
            self._loaded = None


class Encoders:
    """Which encoder goes with an index."""

    def __init__(self, present: MiniLmEncoder, previous: PreviousEncoder | None = None) -> None:
        self.present = present
        self._previous = previous

    def of(self, index: TenantIndex | None) -> MiniLmEncoder:
        """The one that the index was made with; the present one for None."""
        if self._previous is not None and index is not None and index.encoder == key_of(self._previous.name):
            return self._previous.get()
        return self.present


def name_of(encoder: Encoder) -> Name:
    """ID and version."""
    return encoder.id, encoder.version


def key_of(name: Name) -> str:
    """How indexes name an encoder."""
    return " ".join(name)
