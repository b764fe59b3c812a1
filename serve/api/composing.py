"""From the `adapters` of a request to adapters of its tenant, each with its weight."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from serve.api.errors import ApiError
from serve.api.requests import WeightedAdapter
from serve.api.services import Services
from serve.registry.records import Adapter, Resolution

BestPart = Callable[[str], Awaitable[str | None]]
"""The adapter of the part of a document, given by ID, that answers; None where no part can."""


async def find_adapters(
    services: Services, tenant_id: str, named: Sequence[WeightedAdapter], best_part: BestPart
) -> list[tuple[Adapter, float]]:
    """The adapters that these names stand for and their weights, in the order given.

    Raises ApiError: 400 for too many, for collections, for one adapter named twice and for ranks that add up to more
    than the engine holds; 404 for what the tenant does not have; 409 for a document without an adapter yet.
    """
    most = services.config.router.max_composed
    if len(named) > most:
        message = f"'adapters' has {len(named)} entries; 1 to {most} are allowed (router.max_composed)."
        raise ApiError(400, message, param="adapters", code="invalid_value")
    names = [one.id for one in named]
    resolutions = [await services.read(services.registry.resolve_model, tenant_id, name) for name in names]
    ids = [await _one_adapter(i, names[i], found, best_part) for i, found in enumerate(resolutions)]
    for i, adapter_id in enumerate(ids):
        if adapter_id in ids[:i]:
            message = f"'{names[i]}' stands for the adapter {adapter_id}, which is named already; name each once."
            raise ApiError(400, message, param=f"adapters.{i}", code="invalid_value")
    adapters = [await services.read(services.registry.get_adapter, tenant_id, one) for one in ids]
    chosen = []
    for i, adapter in enumerate(adapters):
        if adapter is None:  # deleted just now
            raise _not_found(i, names[i])
        chosen.append((adapter, named[i].weight))
    ranks = [adapter.rank for adapter, _ in chosen]
    if sum(ranks) > services.config.engine.max_lora_rank:
        message = (
            f"The ranks of 'adapters' add up to {' + '.join(map(str, ranks))} = {sum(ranks)}; at most "
            f"{services.config.engine.max_lora_rank} is allowed (engine.max_lora_rank)."
        )
        raise ApiError(400, message, param="adapters", code="invalid_value")
    return chosen


async def _one_adapter(i: int, name: str, found: Resolution | None, best_part: BestPart) -> str:
    if found is None:
        raise _not_found(i, name)
    if found.target.startswith("col_"):
        message = f"'{name}' is a collection; adapters, documents and their aliases are allowed."
        raise ApiError(400, message, param=f"adapters.{i}", code="invalid_value")
    adapter_id = found.adapter_ids[0] if len(found.adapter_ids) == 1 else None
    if len(found.adapter_ids) > 1:
        adapter_id = await best_part(found.target)
    if adapter_id is None:
        message = f"'{name}' has no adapter yet; its document is being processed or has failed."
        raise ApiError(409, message, param=f"adapters.{i}", code="model_not_ready")
    return adapter_id


def _not_found(i: int, name: str) -> ApiError:
    message = f"There is no adapter, document or alias '{name}'."
    return ApiError(404, message, param=f"adapters.{i}", code="model_not_found")
