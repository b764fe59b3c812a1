"""Ray Serve LLM as a peer: the base model with the same engine arguments, on a Ray of its own.

    python -m benchmarks.ray_llm_server PORT

It needs pyarrow, which Imprint's lock lacks; put it on PYTHONPATH. `ray.serve.llm` fetches adapters from a cloud bucket
only, so this serves the base alone.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from benchmarks.vllm_server import ENGINE, ENVIRONMENT, PeerServer
from hypernet.nano import base_dir


def ray_llm_server(port: int, log: Path, packages: str) -> PeerServer:
    """The peer as a process. ``packages``: a folder with pyarrow and what else it lacks."""
    environment = ENVIRONMENT | {"PYTHONPATH": packages, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0",
                                 "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-m", "benchmarks.ray_llm_server", str(port)]
    return PeerServer(command, environment, port, log, "/v1/models")


def main() -> None:
    """Serve until SIGTERM."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    engine = {name.replace("-", "_"): value if name == "dtype" else int(value) for name, value in ENGINE.items()
              if "lora" not in name}
    config = LLMConfig(
        model_loading_config={"model_id": "base", "model_source": str(base_dir())},
        deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}},
        engine_kwargs={**engine, "enforce_eager": True},
        placement_group_config={"bundles": [{"CPU": 0.1}]},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    main()
