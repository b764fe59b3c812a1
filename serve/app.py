"""The graph of deployments, for `serve run`, `serve deploy` and `imprint serve` alike."""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve.autoscaling import autoscaling_config
from serve.checkpoint_rank import check_ranks
from serve.cluster import check_registry_fits_cluster
from serve.config import EngineConfig, ImprintConfig
from serve.gpu_share import cluster_gpus, gpu_shares
from serve.registry import migrate

# Deployments ask Ray for a token share of a CPU only: threads are set by configuration, and all of them must fit on a
# machine with two cores. GPUs, where there are any, are divided by `serve.gpu_share`.
_ACTOR = {"num_cpus": 0.1}
_AFFINITY = "serve.affinity.AdapterAffinityRouter"
# A line in a log file for each request and replica costs more than it tells; `/metrics` counts them.
_EVERY = {
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
    "logging_config": {"enable_access_log": False},
}


def build(args: dict[str, Any] | ImprintConfig) -> Application:
    """The application for these ImprintConfig fields. Brings the registry's schema up to date first.

    Raises ConfigError where the registry does not fit the Ray cluster, its GPUs do not suffice, or the engine's rank
    cap is below the generator's rank.
    """
    config = args if isinstance(args, ImprintConfig) else ImprintConfig(**args)
    check_registry_fits_cluster(config.registry.url)
    check_ranks(config)
    prepare(config)
    # Imported here, so that reading a configuration does not load the deployments' libraries.
    from serve.deployments.engine import EngineDeployment
    from serve.deployments.generator import GeneratorDeployment
    from serve.deployments.ingress import IngressDeployment
    from serve.deployments.router import RouterDeployment

    shares = gpu_shares(config, cluster_gpus())
    engine = ray_serve.deployment(
        EngineDeployment,
        name="engine",
        max_ongoing_requests=4 * config.engine.max_num_seqs,
        ray_actor_options=_ACTOR | {"num_gpus": shares.engine},
        **engine_scale(config.engine),
        **_EVERY,
    ).bind(config)
    router = ray_serve.deployment(
        RouterDeployment,
        name="router",
        num_replicas=config.router.num_replicas,
        max_ongoing_requests=1000,
        ray_actor_options=_ACTOR,
        **_EVERY,
    ).bind(config)
    generator = ray_serve.deployment(
        GeneratorDeployment,
        name="generator",
        num_replicas=config.generator.num_replicas,
        max_ongoing_requests=100,
        ray_actor_options=_ACTOR | {"num_gpus": shares.generator},
        graceful_shutdown_timeout_s=20,
        **_EVERY,
    ).bind(config)
    ingress = ray_serve.deployment(
        IngressDeployment,
        name="ingress",
        num_replicas=config.ingress.num_replicas,
        max_ongoing_requests=10_000,
        ray_actor_options=_ACTOR,
        # Streams of an engine replica that is drained pass through here.
        graceful_shutdown_timeout_s=config.engine.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        **_EVERY,
    )
    return ingress.bind(config, engine, router, generator)


def engine_scale(engine: EngineConfig) -> dict[str, Any]:
    """Ray's options for the number of engine replicas, how they end, and which of them gets a request."""
    options: dict[str, Any] = {
        "max_replicas_per_node": engine.max_replicas_per_node,
        # A replica that is to stop gets no new requests and ends with its last one, or after this time.
        "graceful_shutdown_timeout_s": engine.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    if engine.most_replicas > 1:
        options["request_router_config"] = RequestRouterConfig(request_router_class=_AFFINITY)
    if engine.autoscaling is None:
        return options | {"num_replicas": engine.num_replicas}
    return options | {"autoscaling_config": autoscaling_config(engine.autoscaling)}


def prepare(config: ImprintConfig) -> None:
    """Make the data folder (for its owner only) and bring the registry's schema up to date."""
    config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    migrate(config.registry.url)
