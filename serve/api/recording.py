"""Routing decisions on their way to the registry, off the request path.

A decision waits for at most a second, with others, for one transaction. Those that wait are lost when the process dies;
feedback on them is then refused.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

import anyio.to_thread

from serve.metrics import IngressMetrics
from serve.registry import Registry
from serve.registry.records import RecordedDecision

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
MAX_WAITING = 1000
_REQUEST = re.compile(r"(?:^|[_-])([0-9a-f]{32})(?:-\d+)?$")


def response_key(response_id: str) -> str | None:
    """What a decision is filed under, from the ID of a response (`chatcmpl-…`, `cmpl-…`, `resp_…`) or of its request
    (`req_…`); None for text that is neither.

    Ray's proxy sends a second `x-request-id` of its own, and HTTP clients join the two with a comma.
    """
    found = _REQUEST.search(response_id.partition(",")[0])
    return f"req_{found[1]}" if found else None


class DecisionRecorder:
    """The decisions of one ingress replica. For the event loop's thread."""

    def __init__(self, registry: Registry, metrics: IngressMetrics, kept: int) -> None:
        """`kept`: how many of each tenant the registry keeps; 0: nothing is recorded."""
        self._registry = registry
        self._metrics = metrics
        self._kept = kept
        self._waiting: list[RecordedDecision] = []
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def note(
        self,
        request_id: str,
        tenant_id: str,
        model: str,
        text: str,
        headers: Mapping[str, str],
        decision: Mapping[str, Any],
    ) -> None:
        """Take a decision in; never blocks. With too many waiting it is dropped and counted."""
        if not self._kept:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._metrics.decisions_dropped.inc()
            return
        named = decision["reason"] in ("pinned", "policy_pinned")
        self._waiting.append(
            RecordedDecision(
                response_id=response_key(request_id) or request_id,
                tenant_id=tenant_id,
                created_at=time.time(),
                model=model,
                text=text,
                headers=headers,
                # Where someone has named who answers, candidates were not weighed against each other.
                candidates=[] if named else list(decision.get("candidates") or ()),
                adapter_id=decision.get("adapter_id"),
                document_id=decision.get("document_id"),
                reason=str(decision["reason"]),
                confidence=decision.get("confidence"),
            )
        )
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write())

    async def flush(self) -> None:
        """Write what waits, and wait for what is being written. A failure is logged and counted."""
        async with self._writing:
            rows, self._waiting = self._waiting, []
            if not rows:
                return
            try:
                await anyio.to_thread.run_sync(self._registry.record_decisions, rows, self._kept)
            except Exception:
                logger.exception("%d routing decisions could not be recorded", len(rows))
                self._metrics.decisions_dropped.inc(len(rows))

    async def _write(self) -> None:
        while self._waiting:
            await asyncio.sleep(FLUSH_S)
            await self.flush()
