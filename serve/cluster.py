"""What has to be true of the Ray cluster that the application is deployed on."""

from __future__ import annotations

from sqlalchemy.engine import make_url

from serve.config import ConfigError


def check_registry_fits_cluster(registry_url: str) -> None:
    """Raise ConfigError when the registry is an SQLite file and Ray runs on more than one node.

    Every node would open a file of its own, or one on a network file system, where SQLite's locks do not hold. Where
    Ray does not run there is nothing to check.
    """
    if make_url(registry_url).get_backend_name() != "sqlite":
        return
    import ray

    nodes = sum(bool(node["Alive"]) for node in ray.nodes()) if ray.is_initialized() else 0
    if nodes > 1:
        raise ConfigError(
            f"registry.url: SQLite serves one node only, and this Ray cluster has {nodes}. Set registry.url to a "
            "PostgreSQL database, as in postgresql://user:password@host/imprint."
        )
