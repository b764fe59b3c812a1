"""A converted checkpoint as a folder: `model.safetensors`, and `config.json` that says what it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypernet.published.doc_to_lora import DocToLora, DocToLoraSizes
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.shapes import check
from hypernet.published.text_to_lora import TRAININGS, OutputScale, TextToLora, TextToLoraSizes

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DOC_TO_LORA, TEXT_TO_LORA = "doc-to-lora", "text-to-lora"
VERSION = 1

PER_LAYER, EARLY_EXIT, EMBEDDINGS = "per_layer_activations", "early_exit", "embed_only"
ACTIVATIONS = (PER_LAYER, EARLY_EXIT, EMBEDDINGS)

Model = TypeVar("Model", DocToLora, TextToLora)
Config = TypeVar("Config", "DocToLoraConfig", "TextToLoraConfig")


@dataclass(frozen=True)
class Source:
    """The file that was converted: its name, its SHA-256 in hex, and its length in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Reading:
    """What a Doc-to-LoRA network reads of the base: which activations, after how many layers.

    `quantized` says that the base was in NF4 when the network was trained. A chunk has about `chunk_tokens` tokens
    where a document is cut, and at most `max_tokens`.
    """

    activations: str
    layers: int
    quantized: bool = False
    chunk_tokens: int = 2048
    max_tokens: int = 8192


@dataclass(frozen=True)
class DocToLoraConfig:
    """`config.json` of a converted Doc-to-LoRA checkpoint. The weight's update is `scaling * B^T A`.

    `base_fingerprint` is empty where the base was not at hand when the checkpoint was converted.
    """

    base_model: str
    source: Source
    sizes: DocToLoraSizes
    reading: Reading
    scaling: float
    use_bias: bool = True
    base_fingerprint: str = ""

    @property
    def chunk_rank(self) -> int:
        """How many ranks one more chunk costs."""
        return self.sizes.rank

    @property
    def fixed_rank(self) -> int:
        """How many ranks the bias adapter adds to any adapter."""
        return self.sizes.rank if self.use_bias else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"format": DOC_TO_LORA, "format_version": VERSION, **asdict(self), "sizes": self.sizes.to_json()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> DocToLoraConfig:
        """What `to_json` gave, without format and version. Raises KeyError or TypeError."""
        return DocToLoraConfig(**{
            **values, "source": Source(**values["source"]), "sizes": DocToLoraSizes.from_json(values["sizes"]),
            "reading": Reading(**values["reading"])})


@dataclass(frozen=True)
class TextToLoraConfig:
    """`config.json` of a converted Text-to-LoRA checkpoint. The weight's update is `scaling * B A`.

    `embedding_model` names the text encoder whose vectors the network reads.
    """

    base_model: str
    source: Source
    sizes: TextToLoraSizes
    scaling: float
    embedding_model: str
    output: OutputScale = field(default_factory=OutputScale)
    base_fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"format": TEXT_TO_LORA, "format_version": VERSION, **asdict(self), "sizes": self.sizes.to_json()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> TextToLoraConfig:
        """What `to_json` gave, without format and version. Raises KeyError or TypeError."""
        return TextToLoraConfig(**{
            **values, "source": Source(**values["source"]), "sizes": TextToLoraSizes.from_json(values["sizes"]),
            "output": OutputScale(**values["output"])})


def format_of(folder: Path) -> str:
    """The `format` that a folder's `config.json` names; empty for nano's own kind.

    Raises FileNotFoundError where there is no such file, and CheckpointInvalid where it is no JSON object.
    """
    return str(_read_json(folder).get("format", ""))


def save(folder: Path, config: DocToLoraConfig | TextToLoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder."""
    # Clones: tensors that share memory cannot be saved.
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")


def load_doc_to_lora(folder: Path) -> tuple[DocToLora, DocToLoraConfig]:
    """The network in float32 and evaluation mode. Raises CheckpointInvalid or FileNotFoundError."""
    config = load_doc_to_lora_config(folder)
    tensors = _tensors(folder)
    _check_sizes(folder, config.sizes, DocToLoraSizes.of(tensors))
    return _load(lambda: DocToLora(config.sizes), tensors), config


def load_doc_to_lora_config(folder: Path) -> DocToLoraConfig:
    """What the folder's `config.json` says. Raises CheckpointInvalid or FileNotFoundError."""
    return _config(folder, DOC_TO_LORA, DocToLoraConfig.from_json)


def load_text_to_lora(folder: Path) -> tuple[TextToLora, TextToLoraConfig]:
    """The network in float32 and evaluation mode. Raises CheckpointInvalid or FileNotFoundError."""
    config = _config(folder, TEXT_TO_LORA, TextToLoraConfig.from_json)
    tensors = _tensors(folder)
    # safetensors does not keep the order of keys, which numbers the modules; config.json does.
    found = TextToLoraSizes.of(tensors)
    order = [target.name for target in config.sizes.targets]
    named = sorted(found.targets, key=lambda target: order.index(target.name) if target.name in order else -1)
    _check_sizes(folder, config.sizes, replace(found, targets=tuple(named)))
    return _load(lambda: TextToLora(config.sizes, config.output), tensors), config


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalid(f"{folder / WEIGHTS}: cannot be read as safetensors: {error}") from error


def _check_sizes(folder: Path, written: DocToLoraSizes | TextToLoraSizes,
                 found: DocToLoraSizes | TextToLoraSizes) -> None:
    """Nothing is built of sizes that the tensors do not have: a single wrong number could fill the memory."""
    for part in fields(found):
        says, has = getattr(written, part.name), getattr(found, part.name)
        if says != has or type(says) is not type(has):
            raise CheckpointInvalid(f"{folder / CONFIG}: sizes.{part.name}: is {says}; the tensors ask for {has}")


def _load(build: Callable[[], Model], tensors: Mapping[str, Tensor]) -> Model:
    with torch.device("meta"):
        check(tensors, build())
    model = build()
    model.load_state_dict(tensors)
    model.requires_grad_(False)
    return model.eval()


def _config(folder: Path, wanted: str, build: Callable[[dict[str, Any]], Config]) -> Config:
    """What `build` makes of the folder's `config.json`, which has to be of the format `wanted`."""
    values = _read_json(folder)
    found, version = values.pop("format", ""), values.pop("format_version", None)
    if found != wanted:
        raise CheckpointInvalid(f"{folder / CONFIG}: has the format '{found}'; '{wanted}' is needed")
    if version != VERSION:
        raise CheckpointInvalid(f"{folder / CONFIG}: has format_version {version}; {VERSION} is needed")
    try:
        config = build(values)
    except (KeyError, TypeError) as error:
        raise CheckpointInvalid(f"{folder / CONFIG}: has other fields than this version writes: {error}") from error
    for name, value, right, allowed in _values(config):
        if not right:
            raise CheckpointInvalid(f"{folder / CONFIG}: {name}: is {value!r}; {allowed}")
    return config


def _values(config: DocToLoraConfig | TextToLoraConfig) -> Iterator[tuple[str, Any, bool, str]]:
    """Name, value, whether it is right, and what is allowed, for all but `sizes`, which the tensors decide."""
    number = "a finite number above 0 is needed"
    yield "scaling", config.scaling, _positive(config.scaling), number
    for name in ("base_model", "base_fingerprint"):
        value = getattr(config, name)
        yield name, value, isinstance(value, str), "text is needed"
    yield "base_model", config.base_model, bool(config.base_model), "the name of the base is needed"
    if isinstance(config, TextToLoraConfig):
        output = config.output
        yield "embedding_model", config.embedding_model, isinstance(config.embedding_model, str), "text is needed"
        yield "output.training", output.training, output.training in TRAININGS, f"{' or '.join(TRAININGS)} is allowed"
        yield "output.divisor", output.divisor, _positive(output.divisor), number
        return
    reading = config.reading
    yield "use_bias", config.use_bias, isinstance(config.use_bias, bool), "true or false is needed"
    yield ("reading.activations", reading.activations, reading.activations in ACTIVATIONS,
           f"allowed are {', '.join(ACTIVATIONS)}")
    for name, least in (("layers", 0), ("chunk_tokens", 1), ("max_tokens", 1)):
        value = getattr(reading, name)
        yield f"reading.{name}", value, type(value) is int and value >= least, f"a whole number from {least} is needed"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _read_json(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raw = [name for name in ("pytorch_model.bin", "hypermod.pt") if (folder / name).is_file()]
        hint = f", but an unconverted {raw[0]}: run `imprint checkpoint convert`" if raw else ""
        raise FileNotFoundError(f"{folder} holds no {CONFIG}{hint}")
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{folder / CONFIG}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointInvalid(f"{folder / CONFIG}: holds a {type(values).__name__}; an object is needed")
    return values
