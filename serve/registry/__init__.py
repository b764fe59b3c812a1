"""Metadata of tenants, documents, jobs and adapters, in SQLite or PostgreSQL."""

from serve.registry.database import migrate
from serve.registry.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidInput,
    LeaseLost,
    NotFound,
    RegistryError,
    RegistryNotMigrated,
    VersionNotFound,
)
from serve.registry.registry import Registry

__all__ = [
    "Conflict",
    "IdempotencyConflict",
    "InvalidInput",
    "LeaseLost",
    "NotFound",
    "Registry",
    "RegistryError",
    "RegistryNotMigrated",
    "VersionNotFound",
    "migrate",
]
