"""Where `imprint key` works: the local registry, or a server through an admin key. Both give plain key objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from serve.cli.client import Client
from serve.registry import InvalidInput, NotFound, Registry, migrate
from serve.registry.records import ApiKey, Scope


class KeyStore(Protocol):
    """Creates, lists and revokes keys. A key object has id, scope, label, tenants, created_at, revoked_at."""

    def create(self, scope: Scope, tenants: Sequence[str], label: str) -> tuple[dict[str, Any], str]:
        """A new key and its text; tenants that do not exist are made."""

    def list(self) -> list[dict[str, Any]]:
        """All keys, newest first."""

    def revoke(self, key_id: str) -> None:
        """Revoke at once. Raises NotFound or ClientError for an unknown key."""


class LocalKeys:
    """Keys in the registry of a config file, whether a server is running on it or not."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @classmethod
    @contextmanager
    def open(cls, config_file: Path) -> Iterator[LocalKeys]:
        """Open the registry, made first where there is none. Raises ConfigError, RegistryError."""
        from serve.config import load_serve_file

        config = load_serve_file(config_file).config
        config.data_dir.mkdir(parents=True, exist_ok=True)
        migrate(config.registry.url)
        registry = Registry.open(config.registry.url)
        try:
            yield cls(registry)
        finally:
            registry.close()

    def create(self, scope: Scope, tenants: Sequence[str], label: str) -> tuple[dict[str, Any], str]:
        ids = [(self._registry.get_tenant(name) or self._registry.create_tenant(name)).id for name in tenants]
        if scope == "tenant":
            if len(ids) != 1:
                raise InvalidInput("A tenant key takes one tenant.")
            key, secret = self._registry.create_key(ids[0], scope, label)
        else:
            key, secret = self._registry.create_key(None, scope, label, tenants=ids)
        return self._row(key), secret

    def list(self) -> list[dict[str, Any]]:
        return [self._row(key) for key in self._registry.list_keys()]

    def revoke(self, key_id: str) -> None:
        if self._registry.revoke_key(key_id) is None:
            raise NotFound(f"There is no key '{key_id}'.")

    def _row(self, key: ApiKey) -> dict[str, Any]:
        tenants = [self._registry.get_tenant(tenant_id) for tenant_id in key.tenant_ids]
        return {
            "id": key.id,
            "scope": key.scope,
            "label": key.label,
            "tenants": [tenant.name for tenant in tenants if tenant is not None],
            "created_at": key.created_at,
            "revoked_at": key.revoked_at,
        }


class RemoteKeys:
    """Keys of a running server, through `/v1/keys` and an admin key."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, scope: Scope, tenants: Sequence[str], label: str) -> tuple[dict[str, Any], str]:
        body: dict[str, Any] = {"scope": scope, "label": label}
        if scope == "tenant":
            if len(tenants) != 1:
                raise InvalidInput("A tenant key takes one tenant.")
            body["tenant"] = tenants[0]
        elif scope == "service":
            body["tenants"] = list(tenants)
        answer = self._client.call("POST", "/v1/keys", json=body)
        return _remote_row(answer), str(answer["secret"])

    def list(self) -> list[dict[str, Any]]:
        return [_remote_row(key) for key in self._client.call("GET", "/v1/keys")["data"]]

    def revoke(self, key_id: str) -> None:
        self._client.call("DELETE", f"/v1/keys/{key_id}")


def _remote_row(key: dict[str, Any]) -> dict[str, Any]:
    row = {name: key[name] for name in ("id", "scope", "label")}
    return {**row, "tenants": key["tenant_ids"], "created_at": key["created_at"], "revoked_at": key["revoked_at"]}
