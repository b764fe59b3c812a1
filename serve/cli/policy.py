"""`imprint policy`: a tenant's routing policy on a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.client import connected
from serve.cli.options import DEFAULT_URL, JsonOption, KeyOption, TenantOption, UrlOption
from serve.cli.output import fail, note, print_json, print_table, printable, when

app = typer.Typer(no_args_is_help=True, help="Show, check, set and roll back the routing policy.")
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON; - for stdin.")]
_PATH = "/v1/policy"
_WIDTH = 60


@app.command("show")
def show(
    version: Annotated[int, typer.Option(min=0, help="An earlier version; 0: the one in force.")] = 0,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Print the policy as it was set."""
    with connected(url, key, tenant) as client:
        policy = client.call("GET", _PATH, params={"version": version} if version else {})
    if as_json:
        print_json(policy)
        return
    note(f"version {policy['version']}, {_made(policy)}")
    typer.echo(printable(policy["text"], keep="\n\t"), nl=not policy["text"].endswith("\n"))


@app.command("set")
def set_policy(
    file: FileArgument,
    expected_version: Annotated[
        int, typer.Option(min=-1, help="Only if this version is in force; 0: none, -1: whichever is.")
    ] = -1,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Put a policy in force, after a check. Prints its version."""
    params = {"expected_version": expected_version} if expected_version >= 0 else {}
    text = _read(file)
    with connected(url, key, tenant) as client:
        saved = client.call("PUT", _PATH, params=params, **_body(text))
    _warn(saved)
    if as_json:
        print_json(saved)
    else:
        typer.echo(saved["version"])


@app.command("check")
def check(
    file: FileArgument,
    limit: Annotated[int, typer.Option(min=0, max=1000, help="How many recent requests to decide anew.")] = 200,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """Check a policy, and show which recent requests it would answer otherwise. Changes nothing."""
    text = _read(file)
    with connected(url, key, tenant) as client:
        found = client.call("POST", f"{_PATH}/check", params={"limit": limit}, **_body(text))
    if as_json:
        print_json(found)
        return
    _warn(found)
    note(f"{found['rules']} rules; {found['changed']} of {found['compared']} recent requests would change")
    if found["changes"]:
        rows = [
            [when(one["created_at"]), _answer(one["before"]), _answer(one["after"]),
             ", ".join(step["rule"] for step in one["steps"]) or "-", _shortened(one["text"])]
            for one in found["changes"]
        ]  # fmt: skip
        print_table(["WHEN", "BEFORE", "AFTER", "RULES", "QUESTION"], rows)


@app.command("history")
def history(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many versions to show.")] = 20,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
    as_json: JsonOption = False,
) -> None:
    """List the newest versions; the first one is in force."""
    with connected(url, key, tenant) as client:
        versions = client.call("GET", f"{_PATH}/versions", params={"limit": limit})["data"]
    if as_json:
        print_json(versions)
        return
    rows = [
        [str(one["version"]), when(one["created_at"]), one["created_by"],
         "-" if one["restored_from"] is None else str(one["restored_from"])]
        for one in versions
    ]  # fmt: skip
    print_table(["VERSION", "CREATED", "BY", "RESTORED FROM"], rows)


@app.command("rollback")
def rollback(
    version: Annotated[int, typer.Option(min=0, help="The version to go back to; 0: the one before.")] = 0,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    tenant: TenantOption = "",
) -> None:
    """Put an earlier version in force again, as a new version. Prints its number."""
    with connected(url, key, tenant) as client:
        saved = client.call("POST", f"{_PATH}/rollback", json={"version": version} if version else {})
    note(f"version {saved['version']} is in force, {_made(saved)}")
    typer.echo(saved["version"])


def _read(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file} cannot be read: {error}", 2)


def _body(text: str) -> dict[str, Any]:
    return {"content": text.encode(), "headers": {"Content-Type": "application/yaml"}}


def _made(policy: dict[str, Any]) -> str:
    restored = f", restored from version {policy['restored_from']}" if policy["restored_from"] else ""
    return f"made {when(policy['created_at'])} by {policy['created_by']}{restored}"


def _warn(answer: dict[str, Any]) -> None:
    for warning in answer["warnings"]:
        note(f"warning: {warning}")


def _answer(answer: dict[str, Any]) -> str:
    return f"{answer['document_id'] or 'base'} ({answer['reason']})"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"
