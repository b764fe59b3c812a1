"""OpenAI's `service_tier`, and the priority that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve.config import ImprintConfig

ServiceTier = Literal["auto", "default", "flex", "priority"]


@dataclass(frozen=True)
class Tier:
    """What a request is served as. A lower `priority` is earlier, within its tenant and in the engine."""

    name: Literal["default", "flex", "priority"]
    priority: int


_PRIORITY = Tier("priority", -1)
_DEFAULT = Tier("default", 0)
_FLEX = Tier("flex", 1)


def service_tier(config: ImprintConfig, tenant: str, asked: ServiceTier | None) -> Tier:
    """The tier for what a client asked; `priority` only for tenants that the operator has named, else `default`."""
    if asked == "flex":
        return _FLEX
    if asked == "priority" and tenant in config.admission.priority_tenants:
        return _PRIORITY
    return _DEFAULT
