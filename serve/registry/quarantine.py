"""An adapter whose files are lost or damaged: it answers nobody any more, and its document is generated again."""

from __future__ import annotations

import sqlalchemy as sa

from serve.registry import changes, jobs
from serve.registry.adapters import CURRENT
from serve.registry.documents import lock_document
from serve.registry.stale import queue_again
from serve.registry.tables import adapters


def quarantine_adapter(connection: sa.Connection, now: float, tenant_id: str, adapter_id: str) -> bool:
    """Mark the adapter stale; if its document serves it, queue that document unless a job of it waits or runs.

    False, and nothing happens, when the adapter is neither ready nor degraded: another process was first.
    """
    usable = (
        adapters.c.tenant_id == tenant_id,
        adapters.c.id == adapter_id,
        adapters.c.state.in_(("ready", "degraded")),
    )
    document_id = connection.execute(sa.select(adapters.c.document_id).where(*usable)).scalar_one_or_none()
    # The document first, as all writers lock it.
    document = None if document_id is None else lock_document(connection, tenant_id, document_id)
    if document is None or document.deleted_at is not None:
        return False
    served = connection.execute(sa.select(adapters.c.id).where(*usable, *CURRENT)).first() is not None
    if not connection.execute(adapters.update().where(*usable).values(state="stale")).rowcount:
        return False
    if served:
        jobs.end_refinements(connection, now, document.id, "The files of an adapter are lost or damaged.")
        queue_again(connection, now, document)
    changes.append(connection, now, tenant_id, "adapters_stale", document.id, retired=[adapter_id])
    return True
