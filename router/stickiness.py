"""Which document a conversation was answered from last.

A conversation is known by a keyed hash of its tenant, what it may see, and its messages up to a user's turn; no text
is kept, and the key is this process's own. A chat request brings all earlier messages along, so the hash of those up
to the previous user's turn is what was noted then.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_CONVERSATIONS = 100_000
"""About 20 MB."""
FORGET_S = 3600.0


class Conversations:
    """Documents by conversation, the least recently used forgotten first. May be shared by threads."""

    def __init__(
        self,
        most: int = MAX_CONVERSATIONS,
        forget_s: float = FORGET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A conversation is forgotten `forget_s` seconds after its last turn."""
        self._most = most
        self._forget_s = forget_s
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def held(self, tenant_id: str, scope: str, messages: Sequence[Mapping[str, Any]] | None) -> str | None:
        """The document of the conversation's previous turn; None for a first turn, or where the base answered it.

        `scope` tells apart what requests may see, such as a collection's ID.
        """
        turns = _user_turns(messages)
        if len(turns) < 2 or messages is None:
            return None
        key = self._key(tenant_id, scope, messages[: turns[-2] + 1])
        with self._lock:
            found = self._held.get(key)
        return found[0] if found is not None and self._clock() - found[1] < self._forget_s else None

    def note(
        self, tenant_id: str, scope: str, messages: Sequence[Mapping[str, Any]] | None, document_id: str | None
    ) -> None:
        """Remember what the turn that these messages end with was answered from."""
        turns = _user_turns(messages)
        if not turns or messages is None:
            return
        key = self._key(tenant_id, scope, messages[: turns[-1] + 1])
        with self._lock:
            self._held.pop(key, None)
            if document_id is not None:
                self._held[key] = document_id, self._clock()
                while len(self._held) > self._most:
                    self._held.popitem(last=False)

    def _key(self, tenant_id: str, scope: str, messages: Sequence[Mapping[str, Any]]) -> bytes:
        digest = hashlib.blake2b(key=self._secret, digest_size=16)
        said = [[message.get("role"), message.get("content")] for message in messages]
        digest.update(json.dumps([tenant_id, scope, said], sort_keys=True, default=str).encode())
        return digest.digest()


def _user_turns(messages: Sequence[Mapping[str, Any]] | None) -> list[int]:
    return [i for i, message in enumerate(messages or ()) if message.get("role") == "user"]
