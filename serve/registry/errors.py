"""What the registry raises. Each message can be shown to the client that caused it."""


class RegistryError(Exception):
    """Base of all errors that the registry raises on purpose."""


class RegistryNotMigrated(RegistryError):
    """The database is not at this program's schema revision (missing, older or newer)."""


class NotFound(RegistryError):
    """The thing does not exist, or belongs to another tenant, which looks the same."""


class VersionNotFound(NotFound):
    """The document has no version of this number."""


class Conflict(RegistryError):
    """The change would break a uniqueness rule (an external ID or alias that is taken)."""


class IdempotencyConflict(Conflict):
    """An `Idempotency-Key` was used before with other content."""


class InvalidInput(RegistryError):
    """A value that the registry cannot or will not store (bad name, NUL character, bad cursor)."""


class LeaseLost(RegistryError):
    """The job is no longer held by this worker; what it made must be thrown away."""
