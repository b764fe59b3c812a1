"""A converted checkpoint as a folder: `model.safetensors`, and `config.json` that says what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypernet.published.doc_to_lora import DocToLora, DocToLoraSizes
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.shapes import check
from hypernet.published.text_to_lora import OutputScale, TextToLora, TextToLoraSizes

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DOC_TO_LORA, TEXT_TO_LORA = "doc-to-lora", "text-to-lora"
VERSION = 1

PER_LAYER, EARLY_EXIT, EMBEDDINGS = "per_layer_activations", "early_exit", "embed_only"
ACTIVATIONS = (PER_LAYER, EARLY_EXIT, EMBEDDINGS)

Model = TypeVar("Model", DocToLora, TextToLora)


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


def format_of(folder: Path) -> str:
    """The `format` that a folder's `config.json` names; empty for nano's own kind.

    Raises FileNotFoundError where there is no such file, and CheckpointInvalid where it is no JSON object.
    """
    if not (folder / CONFIG).is_file():
        raw = [name for name in ("pytorch_model.bin", "hypermod.pt") if (folder / name).is_file()]
        hint = f", but an unconverted {raw[0]}: run `imprint checkpoint convert`" if raw else ""
        raise FileNotFoundError(f"{folder} holds no {CONFIG}{hint}")
    return str(_read_json(folder).get("format", ""))


def save(folder: Path, config: DocToLoraConfig | TextToLoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder."""
    # Clones: tensors that share memory cannot be saved.
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")


def load_doc_to_lora(folder: Path) -> tuple[DocToLora, DocToLoraConfig]:
    """The network in float32 and evaluation mode. Raises CheckpointInvalid or FileNotFoundError."""
    fields = _fields(folder, DOC_TO_LORA)
    try:
        config = DocToLoraConfig(**{
            **fields, "source": Source(**fields["source"]), "sizes": DocToLoraSizes.from_json(fields["sizes"]),
            "reading": Reading(**fields["reading"])})
    except (KeyError, TypeError) as error:
        raise CheckpointInvalid(f"{folder / CONFIG}: has other fields than this version writes: {error}") from error
    model = DocToLora(config.sizes)
    return _load(model, folder), config


def load_text_to_lora(folder: Path) -> tuple[TextToLora, TextToLoraConfig]:
    """The network in float32 and evaluation mode. Raises CheckpointInvalid or FileNotFoundError."""
    fields = _fields(folder, TEXT_TO_LORA)
    try:
        config = TextToLoraConfig(**{
            **fields, "source": Source(**fields["source"]), "sizes": TextToLoraSizes.from_json(fields["sizes"]),
            "output": OutputScale(**fields["output"])})
    except (KeyError, TypeError) as error:
        raise CheckpointInvalid(f"{folder / CONFIG}: has other fields than this version writes: {error}") from error
    model = TextToLora(config.sizes, config.output)
    return _load(model, folder), config


def _load(model: Model, folder: Path) -> Model:
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalid(f"{folder / WEIGHTS}: cannot be read as safetensors: {error}") from error
    check(tensors, model)
    model.load_state_dict(tensors)
    model.requires_grad_(False)
    return model.eval()


def _fields(folder: Path, wanted: str) -> dict[str, Any]:
    found = format_of(folder)
    if found != wanted:
        raise CheckpointInvalid(f"{folder / CONFIG}: has the format '{found}'; '{wanted}' is needed")
    fields = _read_json(folder)
    version = fields.pop("format_version", None)
    if version != VERSION:
        raise CheckpointInvalid(f"{folder / CONFIG}: has format_version {version}; {VERSION} is needed")
    del fields["format"]
    return fields


def _read_json(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"{folder / CONFIG}: cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointInvalid(f"{folder / CONFIG}: holds a {type(fields).__name__}; an object is needed")
    return fields
