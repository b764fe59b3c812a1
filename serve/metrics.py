"""Imprint's own Prometheus metrics, and how several processes' metrics become one page.

Each process keeps its metrics in a registry of its own, so that none of them repeats the default collectors (process,
garbage collector); names start with `imprint_`, and no label takes a tenant's or an adapter's name.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
_GATE_SCORES = (-1.0, -0.5, -0.25, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25)
_SCORES = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0)


class IngressMetrics:
    """Metrics of one ingress replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "imprint_http_requests_total",
            "HTTP requests by route template, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "imprint_http_request_duration_seconds",
            "Time from the request's head to the end of its response.",
            ("route", "method"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_chunk_seconds = Histogram(
            "imprint_time_to_first_chunk_seconds",
            "Time from the request's head to the first generated output, as the ingress sends it.",
            ("endpoint", "stream"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "imprint_http_requests_in_flight", "HTTP requests being answered now.", registry=self.registry
        )
        self.admission_wait_seconds = Histogram(
            "imprint_admission_wait_seconds",
            "Time that admitted requests waited in the fair queue.",
            ("queue",),
            buckets=(0.001, *_SECONDS),
            registry=self.registry,
        )
        self.admission_refused = Counter(
            "imprint_admission_refused_total",
            "Requests that the fair queue refused, by why.",
            ("queue", "reason"),
            registry=self.registry,
        )
        self.admission_queued = Gauge(
            "imprint_admission_queued", "Requests in the fair queue now.", ("queue",), registry=self.registry
        )
        self.admission_running = Gauge(
            "imprint_admission_running",
            "Places in use behind the fair queue: sequences in the engine, requests in the encoder.",
            ("queue",),
            registry=self.registry,
        )
        self.documents = Counter(
            "imprint_documents_posted_total",
            "Documents accepted, by whether a new version came of them.",
            ("outcome",),
            registry=self.registry,
        )
        self.decisions = Counter(
            "imprint_route_decisions_total",
            "Routing decisions by reason and by who answers (adapter, composition or base).",
            ("reason", "answered_by"),
            registry=self.registry,
        )
        self.score = Histogram(
            "imprint_route_score",
            "Best candidate's score of routed requests that had candidates.",
            buckets=_SCORES,
            registry=self.registry,
        )
        self.confidence = Histogram(
            "imprint_route_confidence",
            "Calibrated probability of the best candidate of routed requests.",
            buckets=_SHARES,
            registry=self.registry,
        )
        self.decisions_dropped = Counter(
            "imprint_route_decisions_dropped_total",
            "Routing decisions that could not be recorded for feedback.",
            registry=self.registry,
        )
        self.feedback = Counter(
            "imprint_feedback_total", "Feedback accepted, by what it says.", ("kind",), registry=self.registry
        )

    def text(self) -> str:
        """These metrics as Prometheus text."""
        return generate_latest(self.registry).decode()


class RouterMetrics:
    """Metrics of one router replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calibrations = Counter(
            "imprint_router_calibrations_total",
            "Calibrations of tenants, by outcome: fitted (live), no_better, shadow, promoted, rejected, failed.",
            ("outcome",),
            registry=self.registry,
        )
        self.calibration_ece = Histogram(
            "imprint_router_calibration_ece",
            "Expected calibration error of fits to tenants, in cross-validation.",
            buckets=(0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
            registry=self.registry,
        )
        self.calibration_auroc = Histogram(
            "imprint_router_calibration_auroc",
            "Area under the ROC curve of fits to tenants, in cross-validation.",
            buckets=(0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0),
            registry=self.registry,
        )
        self.feedback_log_loss = Gauge(
            "imprint_router_feedback_log_loss",
            "Log loss, in nats, on feedback that a shadow had not seen, of the last comparison: shadow and live.",
            ("stage",),
            registry=self.registry,
        )
        self.calibration_seconds = Histogram(
            "imprint_router_calibration_duration_seconds",
            "Time of one tenant's fit, off the request path.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> str:
        """These metrics as Prometheus text."""
        return generate_latest(self.registry).decode()


class GeneratorMetrics:
    """Metrics of one generator replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Counter(
            "imprint_generation_jobs_ended_total",
            "Ends of generation jobs, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "imprint_generation_stage_duration_seconds",
            "Time of one batch in each stage of generation.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_documents = Histogram(
            "imprint_generation_batch_documents",
            "Documents taken into one batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.queue = Gauge(
            "imprint_generation_jobs",
            "Jobs in the registry that make a document's adapters, by state.",
            ("state",),
            registry=self.registry,
        )
        self.refine_queue = Gauge(
            "imprint_refine_jobs",
            "Jobs in the registry that improve published adapters, by state.",
            ("state",),
            registry=self.registry,
        )
        self.gate_results = Counter(
            "imprint_gate_results_total",
            "Adapters that the quality gate has judged, by what they came from and by the state they got.",
            ("source", "state"),
            registry=self.registry,
        )
        self.gate_score = Histogram(
            "imprint_gate_score",
            "The quality gate's scores, by what the adapter came from.",
            ("source",),
            buckets=_GATE_SCORES,
            registry=self.registry,
        )
        self.gate_seconds = Histogram(
            "imprint_gate_duration_seconds",
            "Time of the quality gate for one adapter.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.refines = Counter(
            "imprint_refine_jobs_ended_total",
            "Ends of jobs that refine a published adapter, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.embed_left = Gauge(
            "imprint_embed_adapters_left",
            "Adapters without vectors of the configured encoder, which are embedded anew while no document waits.",
            registry=self.registry,
        )

    def text(self) -> str:
        """These metrics as Prometheus text."""
        return generate_latest(self.registry).decode()


def merge_texts(*texts: str) -> str:
    """Join pages of Prometheus text, keeping a metric family only the first time that it is declared.

    A family is the block from its HELP or TYPE line to the next family's; a second declaration of the same name would
    make the whole page invalid.
    """
    seen: set[str] = set()
    lines: list[str] = []
    for text in texts:
        own: set[str] = set()
        keep = True
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                keep = name not in seen
                own.add(name)
            if keep and line and line != "# EOF":
                lines.append(line)
        seen |= own
    return "\n".join(lines) + "\n"
