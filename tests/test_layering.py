"""Imports run one way: serve -> router, hypernet. Read from the source, so imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("hypernet", "router", "serve")
# What the libraries must not know: the application's frameworks. The router needs no model server either.
FRAMEWORKS = {"ray", "fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic", "typer", "httpx"}
FORBIDDEN = {
    "hypernet": {"serve", "router", "tests", "vllm"} | FRAMEWORKS,
    "router": {"serve", "hypernet", "tests", "vllm"} | FRAMEWORKS,
    "serve": {"tests", "benchmarks"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import in a module's source. `module` is its dotted name, for relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = [*above, node.module] if node.module else above
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for line, name in imported(path.read_text(), dotted(path))
        if name.partition(".")[0] in FORBIDDEN[package]
    ]
    assert not found, "\n".join(found)


def test_each_package_has_modules() -> None:
    assert all(len(modules(package)) > 1 for package in PACKAGES)


def test_ray_serve_is_never_called_serve() -> None:
    """Our own package has that name."""
    found = []
    for path in modules("serve"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "ray":
                wrong = any(alias.name == "serve" and alias.asname != "ray_serve" for alias in node.names)
            elif isinstance(node, ast.Import):
                wrong = any(alias.name == "ray.serve" and alias.asname != "ray_serve" for alias in node.names)
            else:
                continue
            if wrong:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, found


def test_the_reader_of_imports_sees_all_forms() -> None:
    source = (
        "import ray.serve as a\nfrom hypernet import b\nfrom ..serve import c\nfrom . import d\n"
        "def f():\n    import vllm\n    importlib.import_module('serve.app')\n"
    )
    names = {name for _, name in imported(source, "router.deep.module")}
    assert names == {"ray.serve", "hypernet.b", "router.serve.c", "router.deep.d", "vllm", "serve.app"}
