"""The ingress replica's port, when it listens itself."""

from __future__ import annotations

from functools import wraps
from typing import Any


def take_port_again() -> None:
    """Lets this process's HTTP port be taken again at once after a crash.

    Ray's direct ingress binds without SO_REUSEADDR. After a kill the connections that clients still hold would keep
    the port from the next server for a minute. Ray's own proxy sets the option; here it is passed for this process.
    """
    from ray.serve._private import replica

    start = replica.start_asgi_http_server
    if hasattr(start, "__wrapped__"):
        return

    @wraps(start)
    async def start_asgi_http_server(*args: Any, **kwargs: Any) -> Any:
        return await start(*args, **{**kwargs, "enable_so_reuseport": True})

    replica.start_asgi_http_server = start_asgi_http_server
