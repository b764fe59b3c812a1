"""Runs one Imprint server on this machine: a local Ray, Ray Serve, the application; and ends all of it in order.

The order matters: environment (Ray and vLLM read it when they are imported or start processes), registry schema,
first admin key, leftovers of a killed server, Ray, application, ready line; and backwards on SIGTERM or Ctrl-C, with
vLLM's processes first, since they do not end with their parent.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
import psutil

from serve.blobs import BlobStore
from serve.checkpoint_rank import check_ranks
from serve.config import ConfigError, ImprintConfig, ServeFile, load_serve_file
from serve.registry import Registry, RegistryError
from serve.sweep import sweep

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 128 * 2**20  # requests and answers are small and travel inline
_PR_SET_CHILD_SUBREAPER = 36
_BURY_S = 5.0


class LaunchError(RuntimeError):
    """The server cannot start; the message says why."""


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C; like KeyboardInterrupt no Exception, so that nothing on the way swallows it."""


def environment(config: ImprintConfig, port: int) -> dict[str, str]:
    """What Ray's and vLLM's processes find in their environment, unless the operator has set it otherwise.

    ``port``: where clients reach the server. An ingress replica that is the only one listens there itself (Ray's
    direct ingress), which saves each request the hop through Ray's HTTP proxy.
    """
    settings = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # gRPC between replicas, one event loop in each
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # warnings must not wait for 999 others
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": str(int(_direct(config))),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),  # excluded
        # One port for one replica: nobody waits for it to be forgotten by a load balancer.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_worker_niceness": "0",  # the default, 15, makes the engine lose against everything else
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own ports on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(config.base_path()).is_dir():
        settings["HF_HUB_OFFLINE"] = "1"
    return settings


def run(config_file: str | Path) -> None:
    """Start the server of a config file and stay until SIGTERM or Ctrl-C. Raises SystemExit(1) if it cannot start."""
    try:
        file = load_serve_file(config_file)
        with _signals():
            _become_subreaper()
            _serve(file)
    except (ConfigError, LaunchError, RegistryError) as error:
        print(f"imprint: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def first_admin_key(registry: Registry) -> str | None:
    """The text of a new admin key if the registry has none that is valid, else None."""
    if any(key.scope == "admin" and key.revoked_at is None for key in registry.list_keys()):
        return None
    _, secret = registry.create_key(None, "admin", "first key")
    return secret


def sweep_leftovers(config: ImprintConfig, registry: Registry) -> None:
    """Remove what a killed generator left. It only costs space, so a failure is logged and the server starts."""
    try:
        sweep(config, registry, BlobStore.open(config.blobs.url))
    except Exception:
        logger.exception("leftovers of killed generators could not be removed")


def _serve(file: ServeFile) -> None:
    _check_port(file)
    check_ranks(file.config)
    _set_environment(environment(file.config, file.port))
    # Both read the environment, so not before it is set.
    import ray
    from ray import serve as ray_serve

    from serve.app import build, prepare

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        prepare(file.config)
        registry = Registry.open(file.config.registry.url)
        secret = first_admin_key(registry)
        sweep_leftovers(file.config, registry)
        registry.close()
        if secret is not None:
            _say(f"First admin key, shown only now: {secret}")
        _say(f"Starting on {file.url} (data in {file.config.data_dir}) …")
        context = ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=OBJECT_STORE_BYTES,
        )
        _catch_signals()  # Ray has set its own handlers
        logs = Path(context.address_info["session_dir"]) / "logs"
        http_options = dict(file.http_options)
        if _direct(file.config):
            # It takes these options but for the port. Ray's proxy must be there, though nobody uses it.
            http_options["port"] = _free_port(file.host)
        ray_serve.start(proxy_location="HeadOnly", http_options=http_options)
        try:
            ray_serve.run(build(file.config), name=file.application_name, route_prefix=file.route_prefix)
            _await_ready(file)
        except (RuntimeError, TimeoutError) as error:
            raise LaunchError(f"the application did not start: {error}\nLogs: {logs}") from error
        _say(f"Logs: {logs}")
        _say(f"Imprint is ready on {file.url}  (API: {file.url}/docs)")
        _stay()
    except (_Stopped, KeyboardInterrupt):
        _say("Stopping …")
    finally:
        _stop(file)


def _stay() -> None:
    """Stay until a signal, and bury what this process adopts: vLLM's processes whose replica was killed."""
    own = {child.pid for child in psutil.Process().children()}
    while True:
        time.sleep(_BURY_S)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if child.pid not in own and child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)


def _await_ready(file: ServeFile) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    answer = "no answer"
    with httpx.Client(trust_env=False, timeout=10) as client:
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                response = client.get(f"{file.url}/readyz")
                if response.status_code == 200:
                    return
                answer = response.text
            time.sleep(0.25)
    raise TimeoutError(f"{file.url}/readyz was not ready within {READY_TIMEOUT_S:g} s: {answer}")


def _stop(file: ServeFile) -> None:
    """End the application and every process that came of it."""
    _ignore_signals()
    import ray
    from ray import serve as ray_serve

    processes = psutil.Process().children(recursive=True)
    if ray.is_initialized():
        for name in ("generator", "engine"):
            _shut_down_deployment(name, file.application_name)
        # Ray prints calls that end with its controller as if they were failures.
        with redirect_stdout(io.StringIO()):
            with _give_up_after(STOP_TIMEOUT_S):
                ray_serve.shutdown()
            ray.shutdown()
    # With this process as subreaper, whatever lost its parent is now a child of ours.
    processes = list({*processes, *psutil.Process().children(recursive=True)})
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _shut_down_deployment(name: str, application: str) -> None:
    from ray import serve as ray_serve

    try:
        handle = ray_serve.get_deployment_handle(name, application)
        handle._init(_run_router_in_separate_loop=True)  # this process has no event loop of its own
        # A handle has a method `shutdown` of its own, so the deployment's must be named.
        handle.options(method_name="shutdown").remote().result(timeout_s=STOP_TIMEOUT_S)
    except Exception as error:
        # It may never have started; what is left of it is ended below.
        print(f"imprint: {name} did not shut down in order: {error!r}", file=sys.stderr, flush=True)


@contextmanager
def _give_up_after(seconds: float) -> Iterator[None]:
    """Leave a blocking call that does not come back; the processes are ended by force afterwards."""

    def stuck() -> None:
        os.kill(os.getpid(), signal.SIGALRM)

    def on_alarm(_: int, __: FrameType | None) -> NoReturn:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, on_alarm)
    timer = threading.Timer(seconds, stuck)
    timer.start()
    try:
        with suppress(TimeoutError):
            yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGALRM, previous)


def _check_port(file: ServeFile) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((file.host, file.port))
        except OSError as error:
            raise LaunchError(f"cannot listen on {file.host}:{file.port}: {error.strerror}") from error


def _direct(config: ImprintConfig) -> bool:
    return config.ingress.num_replicas == 1


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _set_environment(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _become_subreaper() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    _catch_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _catch_signals() -> None:
    def stop(_: int, __: FrameType | None) -> NoReturn:
        _ignore_signals()
        raise _Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run(sys.argv[1])
