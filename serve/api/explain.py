"""Why a request was routed as it was: what `explain` adds to answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve.api.services import Services

_TIERS = ("slot", "cpu", "disk")


class CandidateObject(BaseModel):
    """A document that was considered. `score` and `rank` are raw; `confidence` is the calibrated probability that its
    adapter answers correctly, null without a calibration; `threshold` is what that, or else the score, must reach.
    `margin` is its lead in rank over the next document, below 0 for those behind."""

    model_config = ConfigDict(extra="allow")

    adapter_id: str
    document_id: str
    title: str
    score: float
    similarity: float
    word_share: float
    rank: float
    part: int
    parts: int
    state: str
    margin: float | None = None
    confidence: float | None = None
    threshold: float | None = None


class Residency(BaseModel):
    """On how many engine replicas an adapter is in a slot, in vLLM's memory, or on disk only; on others it has to be
    fetched."""

    adapter_id: str
    replicas: int
    slot: int
    cpu: int
    disk: int


class Explanation(BaseModel):
    """A decision in full. `calibration` says what the confidence rests on: version 0 is the one that is shipped.
    `policy` are the steps of the tenant's routing policy. `residency` is null where no engine replica answers."""

    candidates: list[CandidateObject] = Field(default_factory=list)
    score: float | None = None
    confidence: float | None = None
    margin: float | None = None
    threshold: float | None = None
    calibration: dict[str, Any] | None = None
    policy: list[dict[str, Any]] = Field(default_factory=list)
    residency: list[Residency] | None = None
    timings: dict[str, float] = Field(default_factory=dict)


async def explain(services: Services, details: Mapping[str, Any]) -> Explanation:
    """The explanation of a decision, `details` being the router's or one of the same form."""
    given = {name: details[name] for name in Explanation.model_fields if details.get(name) is not None}
    chosen = [one["adapter_id"] for one in details.get("adapters") or ()] or [details.get("adapter_id")]
    listed = [one["adapter_id"] for one in details.get("candidates") or ()]
    wanted = [name for name in dict.fromkeys([*chosen, *listed]) if name]
    found = Explanation.model_validate(given)
    found.residency = await residency(services, wanted)
    return found


async def residency(services: Services, adapter_ids: list[str]) -> list[Residency] | None:
    """Where these adapters are, in their order; None where no engine replica answers."""
    replicas = await services.engine.slots()
    if not replicas:
        return None
    counts = {name: dict.fromkeys(_TIERS, 0) for name in adapter_ids}
    for replica in replicas:
        for place in replica["adapters"]:
            if place["adapter_id"] in counts:
                counts[place["adapter_id"]][place["tier"]] += 1
    return [Residency(adapter_id=name, replicas=len(replicas), **found) for name, found in counts.items()]
