"""When Ray Serve starts and stops engine replicas: by requests in flight and by pressure on the LoRA slots."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve.config import AutoscalingSettings

SLOT_DEMAND = "slot_demand"


def by_requests_and_slots(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """How many engine replicas are needed: the larger of two figures, before Ray applies delays and limits.

    Requests in flight or queued over the target of one replica; and how many replicas' slots the adapters in use and
    the requests that wait for a slot would fill (`EngineDeployment.record_autoscaling_stats`).
    """
    if not context.current_num_replicas:
        return context.target_num_replicas, {}
    by_requests = context.total_num_requests / context.config.target_ongoing_requests
    reported = (context.aggregated_metrics or {}).get(SLOT_DEMAND, {})
    return max(by_requests, sum(reported.values())), {}


def autoscaling_config(settings: AutoscalingSettings) -> AutoscalingConfig:
    """Ray's form of our settings, with the policy above."""
    return AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.target_ongoing_requests,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=by_requests_and_slots),
    )
