"""`imprint key`: create, list and revoke keys, on the local registry or over HTTP with an admin key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from serve.cli.client import Client, ClientError
from serve.cli.key_store import KeyStore, LocalKeys, RemoteKeys
from serve.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, KeyOption, UrlOption
from serve.cli.output import fail, note, print_json, print_table, when
from serve.config import ConfigError
from serve.ids import id_kind
from serve.registry import RegistryError

app = typer.Typer(
    no_args_is_help=True,
    help="Create, list and revoke keys. Works on the local registry; with --url or IMPRINT_URL on a running server, "
    "where IMPRINT_KEY must hold an admin key.",
)
LocalOption = Annotated[bool, typer.Option("--local", help="Use the local registry even if IMPRINT_URL is set.")]


class KeyScope(StrEnum):
    """What a key may do."""

    tenant = "tenant"
    service = "service"
    admin = "admin"


@app.command("create")
def create(
    tenant: Annotated[
        list[str] | None, typer.Option("--tenant", metavar="NAME", help="Made if new. Repeat for a service key.")
    ] = None,
    scope: Annotated[KeyScope, typer.Option(help="tenant: one tenant's data; service: several; admin: keys.")] = (
        KeyScope.tenant
    ),
    label: Annotated[str, typer.Option(help="A note for whoever lists the keys.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    url: UrlOption = "",
    key: KeyOption = "",
    local: LocalOption = False,
) -> None:
    """Make a key and print it, and nothing else, on stdout. It cannot be shown again."""
    tenants = tenant or []
    if scope is KeyScope.admin and tenants:
        fail("an admin key belongs to no tenant: leave --tenant out", 2)
    if scope is KeyScope.tenant and len(tenants) != 1:
        fail("a tenant key needs --tenant NAME once", 2)
    if scope is KeyScope.service and not tenants:
        fail("a service key needs --tenant NAME at least once", 2)
    with _store(config, url, key, local) as store:
        created, secret = store.create(scope.value, tenants, label)
    note(f"{scope.value} key {created['id']}; this is the only time that it is shown:")
    typer.echo(secret)


@app.command("list")
def list_keys(
    config: ConfigOption = DEFAULT_CONFIG,
    url: UrlOption = "",
    key: KeyOption = "",
    local: LocalOption = False,
    as_json: JsonOption = False,
) -> None:
    """List all keys, without their text."""
    with _store(config, url, key, local) as store:
        keys = store.list()
    if as_json:
        print_json(keys)
        return
    rows = [
        [
            item["id"],
            item["scope"],
            ",".join(item["tenants"]) or "-",
            when(item["created_at"]),
            "active" if item["revoked_at"] is None else f"revoked {when(item['revoked_at'])}",
            item["label"],
        ]
        for item in keys
    ]
    print_table(["ID", "SCOPE", "TENANTS", "CREATED", "STATE", "LABEL"], rows)


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="As `imprint key list` shows it.")],
    config: ConfigOption = DEFAULT_CONFIG,
    url: UrlOption = "",
    key: KeyOption = "",
    local: LocalOption = False,
) -> None:
    """Revoke a key at once and for good."""
    if id_kind(key_id) != "key":
        fail(f"'{key_id}' is not a key's ID (key_…); see `imprint key list`", 2)
    with _store(config, url, key, local) as store:
        store.revoke(key_id)
    note(f"{key_id} is revoked")


@contextmanager
def _store(config: ConfigOption, url: str, key: str, local: bool) -> Iterator[KeyStore]:
    try:
        if url and not local:
            with Client(url, key) as client:
                yield RemoteKeys(client)
        else:
            with LocalKeys.open(config) as store:
                yield store
    except (ClientError, ConfigError, RegistryError, OSError) as error:
        fail(str(error))
