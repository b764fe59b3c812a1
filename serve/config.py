"""Typed configuration of one Imprint application.

The file that operators write is an ordinary Ray Serve config file; the `args` of its one application are the fields
of `ImprintConfig`. Environment variables override the file: `IMPRINT_DATA_DIR=/srv/imprint`,
`IMPRINT_ENGINE__MAX_LORAS=4` (two underscores between a section and its field).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

NANO = "nano"
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ConfigError(ValueError):
    """A configuration file cannot be used; the message names the file and the field."""


class Section(BaseModel):
    """Base of all sections: unknown names are errors, since a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class RegistryConfig(Section):
    """Where metadata lives. Empty url: SQLite in data_dir."""

    url: str = ""


class BlobsConfig(Section):
    """Where adapter folders live (an fsspec URL). Empty url: a folder in data_dir."""

    url: str = ""


class BaseModelConfig(Section):
    """The base model: `nano` (shipped), a local folder, or a Hugging Face name."""

    model: str = NANO


class GateConfig(Section):
    """The quality gate: whether an adapter answers from its document before anyone is routed to it.

    `budget_s` is for one adapter. One that scores below `threshold` (None: `hypernet.gate.THRESHOLD`) is kept as
    `degraded`.
    """

    enabled: bool = True
    probes: int = Field(8, ge=1, le=64)
    threshold: float | None = Field(None, ge=0, le=1)
    budget_s: float = Field(1.0, gt=0)


class RefineConfig(Section):
    """Gradient steps on a published adapter while no document waits. A job of it takes about `budget_s` seconds.

    `after_s`: how long after its publication a document is refined, in seconds. `learning_rate` None: by the base's
    width (`hypernet.distill_loop.rate_for`).
    """

    enabled: bool = True
    after_s: float = Field(10, ge=0)
    steps: int = Field(5, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    budget_s: float = Field(5, gt=0)


class DistillConfig(Section):
    """The generator `distill`: gradient steps from nothing for each document, for about `budget_s` seconds.

    Empty `target_modules`: all seven projections of each layer. `learning_rate` as in `refine`. `own_questions`: how
    many questions on a chunk the base may write itself, beside those by templates.
    """

    steps: int = Field(60, ge=1)
    budget_s: float = Field(60, gt=0)
    learning_rate: float | None = Field(None, gt=0)
    rank: int = Field(8, ge=1)
    target_modules: tuple[TargetModule, ...] = ()
    own_questions: int = Field(0, ge=0)


class TaskConfig(Section):
    """Text-to-LoRA for posts with `mode: "task"`. Empty checkpoint: such posts are refused.

    `encoder` is the text encoder that the checkpoint was trained with, a local folder or a Hugging Face name.
    `trust_remote_code` lets an encoder run the Python code that it brings.
    """

    checkpoint: str = ""
    encoder: str = ""
    trust_remote_code: bool = False


class GeneratorConfig(Section):
    """What turns documents into adapters, and how eagerly.

    A document too long for one adapter becomes up to `max_parts` part adapters of at most `chunks_per_part` chunks
    (None: as the checkpoint says, or as many as the engine's rank cap holds), or, with `long_documents: merge`, one
    adapter cut down to that cap; the generator `distill` always makes parts.
    """

    kind: Literal["hypernet", "distill"] = "hypernet"
    checkpoint: str = NANO
    batch_chunks: int = Field(16, ge=1)
    chunks_per_part: int | None = Field(None, ge=1)
    max_parts: int = Field(256, ge=1)
    long_documents: Literal["parts", "merge"] = "parts"
    lease_s: float = Field(20, gt=0)
    poll_s: float = Field(0.5, gt=0)
    num_replicas: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    hold_at: Literal["", "leased", "generated", "uploaded"] = ""
    gate: GateConfig = Field(default_factory=GateConfig)
    refine: RefineConfig = Field(default_factory=RefineConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> GeneratorConfig:
        if self.refine.enabled and not self.gate.enabled:
            raise ValueError("refine.enabled needs gate.enabled, which says whether the refined adapter is better; "
                             "switch both on, or refine off")
        if bool(self.task.checkpoint) != bool(self.task.encoder):
            raise ValueError("task.checkpoint and task.encoder go together; give both or neither")
        return self


class AutoscalingSettings(Section):
    """How many replicas run, by load (see `serve.autoscaling`).

    `target_ongoing_requests`: how many requests, running or queued, one replica is meant to have. The delays are how
    long, in seconds, another number of replicas must have been wanted before it changes.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(32, gt=0)
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> AutoscalingSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        return self


class EngineConfig(Section):
    """The vLLM engine. `extra` goes to AsyncEngineArgs untouched.

    `autoscaling` takes the place of the fixed `num_replicas`. `threads` `auto` divides a machine's cores among the
    replicas that may run on it; any other text is vLLM's `VLLM_CPU_OMP_THREADS_BIND` for every replica. `drain_s`: how
    long a replica that is to stop may take to finish its requests.

    `cache_bytes`: room for adapter files on each node; those in use may exceed it. `cache_dir`, such as a folder in
    /dev/shm, takes the place of one in `data_dir`. `tenant_slot_share`: of `max_loras`, rounded up, that one tenant
    may use while others wait. `on_missing_adapter`: whether the base answers a routed request whose adapter cannot be
    had, or 503 does; a request that names its adapter or document always gets 503. `composition_bytes`: room for
    composed adapters in each engine's shared memory; those in use may exceed it.
    """

    max_loras: int = Field(8, ge=1)
    max_lora_rank: int = Field(64, ge=1)
    max_cpu_loras: int = Field(64, ge=1)
    tenant_slot_share: float = Field(1.0, gt=0, le=1)
    cache_bytes: int = Field(2 << 30, ge=0)
    cache_dir: str = ""
    composition_bytes: int = Field(256 << 20, ge=0)
    on_missing_adapter: Literal["base", "refuse"] = "base"
    max_model_len: int = Field(2048, ge=16)
    dtype: str = "float32"
    kv_cache_gib: int = Field(1, ge=1)
    block_size: int = Field(32, ge=1)
    num_replicas: int = Field(1, ge=1)
    autoscaling: AutoscalingSettings | None = None
    max_replicas_per_node: int | None = Field(None, ge=1)
    drain_s: float = Field(120, ge=0)
    max_num_seqs: int = Field(64, ge=1)
    threads: str = "auto"
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _cpu_cache_holds_the_slots(self) -> EngineConfig:
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras ({self.max_cpu_loras}) must be at least max_loras ({self.max_loras})")
        return self

    @model_validator(mode="after")
    def _one_way_to_count_replicas(self) -> EngineConfig:
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError("num_replicas and autoscaling exclude each other; with autoscaling, set its min_replicas")
        return self

    @property
    def most_replicas(self) -> int:
        """How many replicas can run at a time."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def most_replicas_per_node(self) -> int:
        """How many replicas can run on one machine at a time."""
        return min(self.most_replicas, self.max_replicas_per_node or self.most_replicas)


class RouterConfig(Section):
    """Routing: which encoder, and when the base answers in place of an adapter.

    `confidence`: the calibrated probability of being right that an adapter needs. `threshold`: the score (see
    `router.index`) that it needs where nothing is calibrated, as with an encoder of one's own and few documents.
    `min_margin`: a lead in rank below it is a tie, and the base answers. `switch_margin`: how far another document must
    lead, in rank, for a conversation to leave the one that answered last. `calibrate_every_s`: how often, in seconds,
    the router looks whether tenants' documents or feedback call for a new calibration; 0: never, so that all have
    the one that is shipped.

    `encoder`: `minilm`, which comes with the program, or the path of a sentence-transformers folder. After it was
    changed, the generator embeds documents anew while none waits; until all of a tenant's are, it is served with
    `previous_encoder` (same form), for as long as that is set. None: documents are not routed to until they are
    embedded anew.

    `centroids_per_adapter` are made of its text, up to `question_centroids` more of questions on it.
    `use_degraded` lets adapters that failed the quality gate answer; without it the base answers in their place.
    `max_composed`: how many adapters may answer one request together. `cached_texts`: vectors of questions that the
    router keeps. `index_memory_mb`: of all tenants' indexes together, about; those that were not asked for longest are
    read again when they are. `recorded_decisions`: of each tenant, with the questions, for feedback; 0: none.
    """

    encoder: str = "minilm"
    previous_encoder: str | None = None
    threshold: float = Field(0.4, ge=-1, le=1)
    confidence: float = Field(0.5, gt=0, lt=1)
    min_margin: float = Field(0.0, ge=0, le=1)
    switch_margin: float = Field(0.03, ge=0, le=1)
    calibrate_every_s: float = Field(20, ge=0)
    use_degraded: bool = False
    centroids_per_adapter: int = Field(4, ge=1)
    question_centroids: int = Field(0, ge=0, le=16)
    max_composed: int = Field(4, ge=1, le=64)
    cached_texts: int = Field(10_000, ge=1)
    index_memory_mb: int = Field(1024, ge=1)
    recorded_decisions: int = Field(2000, ge=0, le=100_000)
    num_replicas: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _encoders_differ(self) -> RouterConfig:
        if self.previous_encoder is not None and self.previous_encoder in ("", self.encoder):
            raise ValueError(f"previous_encoder ('{self.previous_encoder}') must be another encoder than encoder "
                             f"('{self.encoder}'), or be left out")
        return self


class AdmissionConfig(Section):
    """The fair queue before the engine (`serve.admission`).

    `max_running`: sequences in the engine for each of its replicas; None: twice `engine.max_num_seqs`, a full batch
    and one that waits, of which some may need slots that are taken. `weights` are shares by tenant name, 1 for others.
    `priority_tenants` may use `service_tier: "priority"`.
    """

    max_running: int | None = Field(None, ge=1)
    max_queued: int = Field(2000, ge=0)
    max_queued_per_tenant: int = Field(1000, ge=0)
    wait_s: float = Field(120, gt=0)
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    priority_tenants: tuple[str, ...] = ()


class IngressConfig(Section):
    """The HTTP API."""

    num_replicas: int = Field(1, ge=1)


class LimitsConfig(Section):
    """Sizes in bytes, times in seconds.

    `request_timeout_s`: for a whole request to the models, its wait in the queue and its stream included.
    """

    max_document_bytes: int = Field(1_000_000, ge=1)
    max_request_bytes: int = Field(4_000_000, ge=1)
    max_wait_s: float = Field(60, ge=0)
    max_embedding_inputs: int = Field(2048, ge=1)
    request_timeout_s: float = Field(600, gt=0)


class ImprintConfig(BaseSettings):
    """Everything the application's deployments need; after construction all URLs and paths are filled in."""

    model_config = SettingsConfigDict(env_prefix="IMPRINT_", env_nested_delimiter="__", extra="forbid")

    data_dir: Path = Path("~/.local/share/imprint")
    registry: RegistryConfig = Field(default_factory=RegistryConfig)
    blobs: BlobsConfig = Field(default_factory=BlobsConfig)
    base: BaseModelConfig = Field(default_factory=BaseModelConfig)
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    ingress: IngressConfig = Field(default_factory=IngressConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file; read neither .env nor secret files."""
        return env_settings, init_settings

    @model_validator(mode="after")
    def _fill_in_places(self) -> ImprintConfig:
        # Ray's workers may have another working directory than the process that read the file.
        self.data_dir = self.data_dir.expanduser().absolute()
        if not self.registry.url:
            self.registry.url = f"sqlite:///{self.data_dir / 'registry.db'}"
        if not self.blobs.url:
            self.blobs.url = f"file://{self.data_dir / 'blobs'}"
        return self

    @property
    def cache_dir(self) -> Path:
        """The node-local cache of adapter folders."""
        return Path(self.engine.cache_dir).expanduser().absolute() if self.engine.cache_dir else self.data_dir / "cache"

    @property
    def staging_dir(self) -> Path:
        """Where the generator writes adapters before they are validated and uploaded."""
        return self.data_dir / "staging"

    def base_path(self) -> str:
        """The base model as a folder path, or as the Hugging Face name that was configured."""
        if self.base.model == NANO:
            from hypernet import nano

            return str(nano.base_dir())
        return _folder_or_name(self.base.model)

    def base_folder(self) -> Path:
        """The base model's folder; a Hugging Face name is looked up in the local cache, or fetched."""
        model = self.base_path()
        if Path(model).is_dir():
            return Path(model)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model))

    def checkpoint_path(self) -> Path:
        """The hypernetwork's folder."""
        if self.generator.checkpoint == NANO:
            from hypernet import nano

            return Path(nano.hypernet_dir())
        return Path(self.generator.checkpoint).expanduser().absolute()


class ServeFile(BaseModel):
    """What the launcher needs from a Ray Serve config file; the rest of the file is Ray's."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    path: Path
    host: str
    port: int
    http_options: dict[str, Any]
    application_name: str
    route_prefix: str
    config: ImprintConfig

    @property
    def url(self) -> str:
        """The address that clients use."""
        host = "127.0.0.1" if self.host in ("", "0.0.0.0", "::") else self.host
        prefix = "" if self.route_prefix == "/" else self.route_prefix.rstrip("/")
        return f"http://{host}:{self.port}{prefix}"


def load_serve_file(path: str | Path) -> ServeFile:
    """Read and check a Ray Serve config file that holds one Imprint application.

    Raises ConfigError, naming file and field, when it cannot be read or does not validate.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    applications = raw.get("applications") if isinstance(raw, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: expected a Ray Serve config with exactly one entry under 'applications'")
    application = applications[0]
    http_options = raw.get("http_options") or {}
    args = application.get("args") or {}
    for name, value in (("http_options", http_options), ("applications[0].args", args)):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: '{name}' must be a mapping, not {type(value).__name__}")
    try:
        return ServeFile(
            path=path,
            host=http_options.get("host", "127.0.0.1"),
            port=http_options.get("port", 8000),
            http_options=http_options,
            application_name=application.get("name", "imprint"),
            route_prefix=application.get("route_prefix", "/"),
            config=ImprintConfig(**args),
        )
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error


def _folder_or_name(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else model


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
