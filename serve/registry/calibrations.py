"""Tenants' calibrations of the router: at most one live, one in shadow and a few retired; and what they rest on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa

from serve.registry.adapters import CURRENT
from serve.registry.checks import check_metadata
from serve.registry.records import AskedProbe, CalibrationStage, StoredCalibration
from serve.registry.tables import adapters, calibrations, documents, tenant_heads

KEPT = 10
"""Versions of each tenant."""


def store(
    connection: sa.Connection, now: float, new: StoredCalibration, expected_version: int
) -> StoredCalibration | None:
    """Add a calibration as the next version, and retire the one of its stage before.

    None, and nothing is done, where the newest version is not `expected_version`: someone else was faster.
    """
    mine = calibrations.c.tenant_id == new.tenant_id
    newest = connection.execute(sa.select(sa.func.max(calibrations.c.version)).where(mine)).scalar_one_or_none() or 0
    if newest != expected_version:
        return None
    connection.execute(calibrations.update().where(mine, calibrations.c.stage == new.stage).values(stage="retired"))
    version = newest + 1
    connection.execute(
        calibrations.insert().values(
            tenant_id=new.tenant_id,
            version=version,
            stage=new.stage,
            encoder=new.encoder,
            encoder_version=new.encoder_version,
            generator_fingerprint=new.generator_fingerprint,
            seq=new.seq,
            feedback_until=new.feedback_until,
            body=check_metadata({**new.body, "version": version}),
            created_at=now,
        )
    )
    old = calibrations.c.stage == "retired", calibrations.c.version <= version - KEPT
    connection.execute(calibrations.delete().where(mine, *old))
    return _stored(connection.execute(sa.select(calibrations).where(mine, calibrations.c.version == version)).one())


def promote(connection: sa.Connection, tenant_id: str, version: int) -> bool:
    """Make a shadow live, in place of the live one. False where it is a shadow no more."""
    mine = calibrations.c.tenant_id == tenant_id
    shadow = mine, calibrations.c.version == version, calibrations.c.stage == "shadow"
    if connection.execute(sa.select(calibrations.c.version).where(*shadow)).one_or_none() is None:
        return False
    connection.execute(calibrations.update().where(mine, calibrations.c.stage == "live").values(stage="retired"))
    connection.execute(calibrations.update().where(mine, calibrations.c.version == version).values(stage="live"))
    return True


def retire_shadow(connection: sa.Connection, tenant_id: str, version: int) -> None:
    """End a shadow that was no better."""
    shadow = calibrations.c.tenant_id == tenant_id, calibrations.c.version == version, calibrations.c.stage == "shadow"
    connection.execute(calibrations.update().where(*shadow).values(stage="retired"))


def in_stage(
    connection: sa.Connection, tenant_ids: Collection[str], stage: CalibrationStage
) -> dict[str, StoredCalibration]:
    """Tenant -> its calibration of a stage; a tenant without one is left out."""
    query = sa.select(calibrations).where(
        calibrations.c.tenant_id.in_(list(tenant_ids)), calibrations.c.stage == stage
    )
    return {row.tenant_id: _stored(row) for row in connection.execute(query)}


def newest_version(connection: sa.Connection, tenant_id: str) -> int:
    """The number of the tenant's newest calibration, 0 where it has none."""
    query = sa.select(sa.func.max(calibrations.c.version)).where(calibrations.c.tenant_id == tenant_id)
    return connection.execute(query).scalar_one_or_none() or 0


def heads(connection: sa.Connection, tenant_ids: Collection[str]) -> Mapping[str, int]:
    """Tenant -> number of its newest change."""
    query = sa.select(tenant_heads).where(tenant_heads.c.tenant_id.in_(list(tenant_ids)))
    return {row.tenant_id: row.seq for row in connection.execute(query)}


def asked_probes(connection: sa.Connection, tenant_id: str) -> list[AskedProbe]:
    """What the quality gate asked the current adapters of live documents that may answer, by document and part."""
    query = (
        sa.select(
            adapters.c.id,
            adapters.c.document_id,
            adapters.c.generator_fingerprint,
            adapters.c.manifest[("gate", "asked")].label("asked"),
        )
        .join(documents, documents.c.id == adapters.c.document_id)
        .where(
            adapters.c.tenant_id == tenant_id,
            adapters.c.state == "ready",
            documents.c.deleted_at.is_(None),
            *CURRENT,
        )
        .order_by(adapters.c.document_id, adapters.c.part)
    )
    return [
        AskedProbe(row.id, row.document_id, row.generator_fingerprint, str(one["question"]), bool(one["right"]))
        for row in connection.execute(query)
        for one in row.asked or ()
    ]


def _stored(row: sa.Row[Any]) -> StoredCalibration:
    return StoredCalibration(
        tenant_id=row.tenant_id,
        version=row.version,
        stage=row.stage,
        encoder=row.encoder,
        encoder_version=row.encoder_version,
        generator_fingerprint=row.generator_fingerprint,
        seq=row.seq,
        feedback_until=row.feedback_until,
        body=row.body,
        created_at=row.created_at,
    )
