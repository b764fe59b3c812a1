"""`GET /v1/slots`: where each engine replica's adapters are, for operators."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from serve.api.auth import AdminDep
from serve.api.errors import ApiError, error_docs
from serve.api.services import ServicesDep

router = APIRouter(prefix="/v1/slots", tags=["operation"])


class AdapterPlace(BaseModel):
    """One adapter on a replica. `tier`: in a slot, in vLLM's memory (`cpu`), or its files on the node (`disk`).

    Times are seconds since the epoch: `since` that of its coming into this tier of vLLM's memory, `last_used` that of
    its last request's begin or end. `users`: requests now; `uses`: as far as the replica remembers; `hits`: those that
    found it in vLLM's memory since it was loaded there, which took `load_ms`. Null where it is not known.
    """

    adapter_id: str
    tier: Literal["slot", "cpu", "disk"]
    since: float | None
    last_used: float | None
    users: int
    uses: int
    hits: int
    load_ms: float | None
    bytes: int


class Evictions(BaseModel):
    """How many adapters made room for others since the replica's start, by the tier that they left."""

    slot: int
    cpu: int
    disk: int


class EngineSlots(BaseModel):
    """One engine replica. `in_slots` of its `slots` are filled; `in_cpu` counts those in slots too, `on_disk` all
    whose files are on the node; `adapters` lists at most the 1,000 last used of those that are on disk only.
    `waiting`: requests without a slot."""

    replica: str
    slots: int
    max_cpu_loras: int
    in_slots: int
    in_cpu: int
    on_disk: int
    cache_bytes: int
    waiting: int
    evictions: Evictions
    adapters: list[AdapterPlace]


class SlotsList(BaseModel):
    """All engine replicas that answered."""

    object: Literal["list"] = "list"
    data: list[EngineSlots]


@router.get("", responses=error_docs(401, 403, 503))
async def list_slots(services: ServicesDep, _: AdminDep) -> SlotsList:
    """Which adapters are in a slot, in vLLM's memory or on disk, for each engine replica. Needs an admin key."""
    replicas = await services.engine.slots()
    if not replicas:
        raise ApiError(503, "No engine replica answers.", code="engine_unavailable")
    return SlotsList(data=[EngineSlots(**replica) for replica in replicas])
