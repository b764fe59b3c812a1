"""Tenants' calibrations: kept at hand for requests, and fitted anew in the background.

A tenant's live calibration is fitted to what the quality gate asked its adapters: its own questions, the same with the
right document taken out of the results, and general chat. Feedback moves it only by way of a shadow: that is fitted to
the feedback so far, and becomes live when it does better than the live one on feedback given after that. Each tenant's
calibration is fitted from its own questions, documents and feedback, around the one that is shipped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from router.calibrate import Calibration, Example, features, features_of, fit, log_loss
from router.embed import Encoder, MiniLmEncoder
from router.index import Scored, TenantIndex
from router.shipped import general_chat, shipped_calibration
from router.text import words
from serve.deployments.router_encoders import Encoders, name_of
from serve.deployments.router_index import TenantIndexes
from serve.metrics import RouterMetrics
from serve.niceness import step_back
from serve.registry import Registry
from serve.registry.records import AskedProbe, CalibrationStage, Feedback, StoredCalibration

logger = logging.getLogger(__name__)

MAX_TENANTS = 1000
_TENANTS_AT_ONCE = 500
MIN_PROBES = 16
"""Fewer say less than the calibration that is shipped."""
MAX_PROBES = 400
"""Sampled evenly: about two seconds of the encoder."""
MIN_FEEDBACK = 20
"""Pieces of feedback for a shadow, and after it for its promotion."""
RARER = 20
"""A tenant is fitted again after so small a part of the changes that it has had: one in twenty."""
_PIECE = 8
_PAUSE_S = 0.005
T = TypeVar("T")


class TenantCalibrations:
    """The live calibration of each tenant as it was at the last refresh. May be shared by threads."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._tenants: OrderedDict[str, Calibration | None] = OrderedDict()

    def current(self, tenant_id: str, encoder: Encoder) -> Calibration | None:
        """The tenant's calibration, else the shipped one; None where neither is for this encoder.

        Reads the registry the first time that a tenant is asked for.
        """
        own = self._own(tenant_id)
        return own if own is not None and _fits(own, encoder) else shipped_calibration(*name_of(encoder))

    def _own(self, tenant_id: str) -> Calibration | None:
        with self._lock:
            if tenant_id in self._tenants:
                self._tenants.move_to_end(tenant_id)
                return self._tenants[tenant_id]
        found = self._read([tenant_id])
        with self._lock:
            self._tenants[tenant_id] = found[tenant_id]
            while len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        return found[tenant_id]

    def tenants(self) -> list[str]:
        """Who has been asked for, the last one last."""
        with self._lock:
            return list(self._tenants)

    def refresh(self) -> None:
        """Read all calibrations that are at hand anew."""
        tenants = self.tenants()
        for start in range(0, len(tenants), _TENANTS_AT_ONCE):
            found = self._read(tenants[start : start + _TENANTS_AT_ONCE])
            with self._lock:
                self._tenants.update({tenant: one for tenant, one in found.items() if tenant in self._tenants})

    def _read(self, tenant_ids: Sequence[str]) -> dict[str, Calibration | None]:
        stored = self._registry.calibrations(tenant_ids)
        return {tenant: _parsed(stored.get(tenant)) for tenant in tenant_ids}


class Calibrator:
    """Fits calibrations of the tenants that this replica serves, on a thread of low priority."""

    def __init__(
        self,
        registry: Registry,
        encoders: Encoders,
        indexes: TenantIndexes,
        calibrations: TenantCalibrations,
        metrics: RouterMetrics,
        every_s: float,
    ) -> None:
        """A tenant's calibration is of the encoder that its index is searched with."""
        self._registry = registry
        self._encoders = encoders
        self._indexes = indexes
        self._calibrations = calibrations
        self._metrics = metrics
        self._every_s = every_s
        self._stop = threading.Event()
        self._seen: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="router-calibration", daemon=True)

    def start(self) -> None:
        """Begin to look for work, unless that is switched off."""
        if self._every_s > 0:
            self._thread.start()

    def stop(self) -> None:
        """End before the next tenant."""
        self._stop.set()

    def run_once(self) -> None:
        """Look at every tenant once, and take what others have fitted. A tenant whose fit fails keeps what it has."""
        tenants = self._calibrations.tenants()
        for start in range(0, len(tenants), _TENANTS_AT_ONCE):
            some = tenants[start : start + _TENANTS_AT_ONCE]
            heads, fed = self._registry.heads(some), self._registry.newest_feedback(some)
            live, shadow = self._registry.calibrations(some), self._registry.calibrations(some, "shadow")
            for tenant in some:
                if self._stop.is_set():
                    return
                try:
                    self._documents(tenant, heads.get(tenant, 0), live.get(tenant))
                    if tenant in fed:
                        self._feedback(tenant, fed[tenant], live.get(tenant), shadow.get(tenant))
                except Exception:
                    logger.exception("the calibration of %s failed", tenant)
                    self._metrics.calibrations.labels("failed").inc()
        self._calibrations.refresh()

    def _run(self) -> None:
        step_back()
        while not self._stop.wait(self._every_s):
            try:
                self.run_once()
            except Exception:
                # A registry that fails now may work again at the next turn.
                logger.exception("calibrations could not be looked at")

    def _documents(self, tenant_id: str, head: int, live: StoredCalibration | None) -> None:
        """Fit the live calibration anew where documents have changed since."""
        encoder = self._encoder_of(tenant_id)
        mine = live is not None and (live.encoder, live.encoder_version) == name_of(encoder)
        known = max(live.seq if live is not None and mine else 0, self._seen.get(tenant_id, 0))
        if head - known < max(1, known // RARER):
            return
        self._seen[tenant_id] = head
        while len(self._seen) > 2 * MAX_TENANTS:
            del self._seen[next(iter(self._seen))]
        until = live.feedback_until if live is not None else 0.0
        feedback = [one for one in self._registry.feedback_since(tenant_id) if one.created_at <= until]
        found = self._fit(tenant_id, feedback)
        if found is None:
            return
        calibration, generator, examples = found
        shipped = shipped_calibration(calibration.encoder, calibration.encoder_version)
        if shipped is not None and not _better(calibration, shipped, examples):
            self._metrics.calibrations.labels("no_better").inc()
            return
        if self._store(tenant_id, "live", calibration, generator, head, until):
            self._metrics.calibrations.labels("fitted").inc()

    def _feedback(
        self, tenant_id: str, newest: float, live: StoredCalibration | None, shadow: StoredCalibration | None
    ) -> None:
        """Judge the shadow by feedback that it has not seen, or fit one where there is none."""
        encoder, known = self._encoder_of(tenant_id), _parsed(shadow)
        if shadow is not None and known is not None and _fits(known, encoder):
            if newest > shadow.feedback_until:
                self._judge(tenant_id, shadow, known, encoder)
            return
        until = live.feedback_until if live is not None else 0.0
        if newest <= until or len(self._registry.feedback_since(tenant_id, until, MIN_FEEDBACK)) < MIN_FEEDBACK:
            return
        feedback = self._registry.feedback_since(tenant_id)
        found = self._fit(tenant_id, feedback)
        if found is not None:
            calibration, generator, _ = found
            head, seen = self._registry.head(tenant_id), feedback[-1].created_at
            if self._store(tenant_id, "shadow", calibration, generator, head, seen):
                self._metrics.calibrations.labels("shadow").inc()

    def _judge(self, tenant_id: str, stored: StoredCalibration, shadow: Calibration, encoder: Encoder) -> None:
        live = self._calibrations.current(tenant_id, encoder)
        examples = feedback_examples(self._registry.feedback_since(tenant_id, stored.feedback_until))
        if len(examples) < MIN_FEEDBACK:
            return
        losses = [_loss(one, examples) for one in (shadow, live)]
        for stage, loss in zip(("shadow", "live"), losses, strict=True):
            self._metrics.feedback_log_loss.labels(stage).set(loss)
        if losses[0] < losses[1]:
            if self._registry.promote_calibration(tenant_id, stored.version):
                self._metrics.calibrations.labels("promoted").inc()
                logger.info("%s: calibration %d is live, log loss %.3f instead of %.3f on %d pieces of feedback",
                            tenant_id, stored.version, *losses, len(examples))
        else:
            self._registry.retire_shadow(tenant_id, stored.version)
            self._metrics.calibrations.labels("rejected").inc()

    def _fit(self, tenant_id: str, feedback: Sequence[Feedback]) -> tuple[Calibration, str, list[Example]] | None:
        """A calibration around the shipped one, the generator that it is for, and what it was fitted to; None where
        there is too little to fit to."""
        begun = time.monotonic()
        index = self._indexes.current(tenant_id)
        encoder = self._encoders.of(index)
        probes = _sampled(self._registry.asked_probes(tenant_id), MAX_PROBES)
        examples = feedback_examples(feedback)
        if len(probes) >= MIN_PROBES:
            examples += probe_examples(index, probes, partial(self.embed, encoder=encoder))
        if len(examples) < MIN_PROBES or len({one.right for one in examples}) < 2:
            return None
        generator = probes[-1].generator_fingerprint if probes else ""
        name = name_of(encoder)
        calibration = fit(examples, *name, generator, shipped_calibration(*name))
        self._metrics.calibration_seconds.observe(time.monotonic() - begun)
        if calibration.quality is not None:
            self._metrics.calibration_ece.observe(calibration.quality.ece)
            if calibration.quality.auroc is not None:
                self._metrics.calibration_auroc.observe(calibration.quality.auroc)
        return calibration, generator, examples

    def embed(self, texts: Sequence[str], encoder: MiniLmEncoder | None = None) -> np.ndarray:
        """Vectors of texts, float32 [texts, dimension], L2-normalised, by the present encoder where none is given: in
        pieces, since requests wait for the encoder, and uncached, not to push out theirs."""
        encoder = encoder or self._encoders.present
        pieces = []
        for start in range(0, len(texts), _PIECE):
            pieces.append(encoder.embed(texts[start : start + _PIECE], cached=False))
            self._stop.wait(_PAUSE_S)
        return np.concatenate(pieces)

    def _encoder_of(self, tenant_id: str) -> MiniLmEncoder:
        """The one that the tenant's index is searched with, as far as that is in memory."""
        return self._encoders.of(self._indexes.in_memory(tenant_id))

    def _store(
        self, tenant_id: str, stage: CalibrationStage, made: Calibration, generator: str, seq: int, until: float
    ) -> bool:
        """False where another replica has stored one meanwhile."""
        version = self._registry.newest_calibration_version(tenant_id)
        new = StoredCalibration(tenant_id, stage, made.encoder, made.encoder_version, generator, seq, until,
                                replace(made, version=version + 1).to_json())
        return self._registry.store_calibration(new, version) is not None


def _parsed(stored: StoredCalibration | None) -> Calibration | None:
    """A stored calibration, if there is one that fits this program."""
    if stored is None:
        return None
    try:
        found = Calibration.from_json(stored.body)
    except ValueError as error:
        logger.warning("calibration %d of %s is not used: %s", stored.version, stored.tenant_id, error)
        return None
    return found if (found.encoder, found.encoder_version) == (stored.encoder, stored.encoder_version) else None


def _fits(calibration: Calibration, encoder: Encoder) -> bool:
    return (calibration.encoder, calibration.encoder_version) == name_of(encoder)


def probe_examples(
    index: TenantIndex, probes: Sequence[AskedProbe], embed: Callable[[Sequence[str]], np.ndarray]
) -> list[Example]:
    """What the router would have chosen for each question, and whether that was right; every other question also as if
    its document were not there; and general chat, half as many.

    `embed` gives float32 [texts, dimension], L2-normalised, for texts.
    """
    chat = _sampled(general_chat(), max(1, len(probes) // 2))
    questions = [probe.question for probe in probes]
    vectors = embed([*questions, *chat])
    examples: list[Example] = []
    for place, (probe, vector) in enumerate(zip(probes, vectors, strict=False)):
        results = index.search(vector, words(probe.question), limit=3)
        if results:
            right = results[0].entry.adapter_id == probe.adapter_id and probe.right
            examples.append(_example(results, right))
        others = [one for one in results if one.entry.document_id != probe.document_id]
        if place % 2 and others:
            examples.append(_example(others, False))
    for text, vector in zip(chat, vectors[len(probes) :], strict=True):
        if results := index.search(vector, words(text), limit=2):
            examples.append(_example(results, False))
    return examples


def feedback_examples(feedback: Sequence[Feedback]) -> list[Example]:
    """What feedback says about the candidates of routed requests: at most two examples of each."""
    examples: list[Example] = []
    for one in feedback:
        for candidate, right in _said(one):
            examples.append(Example(_features(candidate), right, str(candidate["adapter_id"])))
    return examples


def _said(one: Feedback) -> list[tuple[Mapping[str, Any], bool]]:
    if not one.candidates:
        return []  # the client, or a policy, named who answers
    first = one.candidates[0]
    if one.no_document:
        return [(first, False)]
    if one.right_document_id is not None:
        named = [c for c in one.candidates[1:] if c["document_id"] == one.right_document_id]
        return [(first, first["document_id"] == one.right_document_id), *((c, True) for c in named[:1])]
    served = next((c for c in one.candidates if c["adapter_id"] == one.adapter_id), None)
    if served is not None:
        return [(served, one.rating == "up")]
    # The base answered. If that was good, the best candidate would not have been; if not, nothing says who would.
    return [(first, False)] if one.rating == "up" else []


def _features(candidate: Mapping[str, Any]) -> tuple[float, ...]:
    score, rank = float(candidate["score"]), float(candidate["rank"])
    return features(float(candidate["similarity"]), float(candidate["word_share"]), score - rank, candidate["margin"])


def _example(results: Sequence[Scored], right: bool) -> Example:
    margin = results[0].rank - results[1].rank if len(results) > 1 else None
    return Example(features_of(results[0], margin), right, results[0].entry.adapter_id)


def _better(new: Calibration, shipped: Calibration, examples: Sequence[Example]) -> bool:
    """Whether a fit beats the shipped calibration on its own examples, in cross-validation."""
    return new.quality is not None and new.quality.log_loss < _loss(shipped, examples)


def _loss(calibration: Calibration | None, examples: Sequence[Example]) -> float:
    """Log loss; without a calibration that of always saying one half."""
    outcomes = np.array([float(one.right) for one in examples])
    probabilities = [0.5 if calibration is None else calibration.probability(one.features) for one in examples]
    return log_loss(np.array(probabilities), outcomes)


def _sampled(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly over all."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]
