"""Which engine replica gets a request: the one that most probably has its adapter in a slot, unless that one has much
more to do than the others.

Each adapter has an order of replicas of its own (rendezvous hashing; Thaler and Ravishankar 1998), so a replica that
comes or goes moves only its share of the adapters. A request goes to the first replica in that order whose load stays
within a bound over the mean (consistent hashing with bounded loads; Mirrokni, Thorup and Zadimoghaddam 2016), so a
popular adapter spreads over as many replicas as it needs, always the same ones. Requests without an adapter go to the
less loaded of two random replicas.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

BALANCE = 1.25
SPARE = 2  # requests that a replica always takes: an engine's step with two takes hardly longer than with one


def rank(adapter_id: str, replica_ids: Sequence[str]) -> list[str]:
    """The replicas in this adapter's order, first choice first."""
    return sorted(replica_ids, key=lambda replica_id: _weight(adapter_id, replica_id), reverse=True)


def order_by_affinity(adapter_id: str, loads: Mapping[str, int], balance: float = BALANCE) -> list[str]:
    """All replicas in the order in which to try them for an adapter's request.

    ``loads``: requests in flight by replica ID. First those that would stay within ``balance`` times the mean and one
    more, or within `SPARE`, in the adapter's order; then the others, the least loaded first.
    """
    bound = max(SPARE, balance * (sum(loads.values()) + 1) / max(1, len(loads)) + 1)
    ranked = rank(adapter_id, list(loads))
    within = [replica_id for replica_id in ranked if loads[replica_id] + 1 <= bound]
    beyond = [replica_id for replica_id in ranked if loads[replica_id] + 1 > bound]
    return within + sorted(beyond, key=lambda replica_id: loads[replica_id])


class AdapterAffinityRouter(RequestRouter):
    """Ray Serve's request router for the engine.

    The adapter is the call's `multiplexed_model_id`, or what its `EngineContext` names. Loads are the
    queue lengths that replicas report with each request that they take; a replica that has reported none for ten
    seconds counts as idle until Ray asks it again.
    """

    def initialize_state(self, balance: float = BALANCE) -> None:
        """Ray calls this with the router's keyword arguments. ``balance`` as in `order_by_affinity`."""
        if balance < 1:
            raise ValueError(f"balance must be at least 1, not {balance}")
        self._balance = balance

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas; Ray takes the least loaded one of a group that has room, else goes to the next group."""
        if pending_request is None:
            return [candidate_replicas]
        # Without this Ray tries again at once, and for ever, where all replicas are full.
        pending_request.routing_context.should_backoff = True
        adapter_id = adapter_of(pending_request)
        if adapter_id is None:
            two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            return [two, [replica for replica in candidate_replicas if replica not in two]]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cached = self.replica_queue_len_cache
        loads = {name: cached.get(replica.replica_id) or 0 for name, replica in by_id.items()}
        return [[by_id[name]] for name in order_by_affinity(adapter_id, loads, self._balance)]


def adapter_of(request: PendingRequest) -> str | None:
    """The adapter, or composition of adapters, that a call to the engine needs; None for the base model."""
    if request.metadata.multiplexed_model_id:
        return str(request.metadata.multiplexed_model_id)
    for argument in (*request.args, *request.kwargs.values()):
        key = getattr(argument, "lora_key", None) or getattr(argument, "adapter_id", None)
        if key is not None:
            return str(key)
    return None


def _weight(adapter_id: str, replica_id: str) -> bytes:
    # Lengths cannot be confused: a zero byte is in neither ID.
    return blake2b(f"{adapter_id}\0{replica_id}".encode(), digest_size=8).digest()
