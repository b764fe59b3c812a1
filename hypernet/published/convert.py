"""Turns a published checkpoint into a folder that holds no pickle.

Sizes, depth and the number of blocks are read from the tensors. From the configuration beside them come only what no
tensor tells: the base's name, the scaling, and which activations are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hypernet.fingerprint import fingerprint_folder
from hypernet.published.doc_to_lora import DocToLora, DocToLoraSizes
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.folder import (
    ACTIVATIONS,
    EARLY_EXIT,
    EMBEDDINGS,
    PER_LAYER,
    DocToLoraConfig,
    Reading,
    Source,
    TextToLoraConfig,
    save,
)
from hypernet.published.pickles import Record, read_pickle
from hypernet.published.shapes import check
from hypernet.published.text_to_lora import TRAININGS, OutputScale, TextToLora, TextToLoraSizes

Report = Callable[[str, int, int], None]
"""Called with a stage ("hashing", "reading", "checking", "writing"), what is done of it, and all there is to do."""

DOC_FILE, TEXT_FILE = "pytorch_model.bin", "hypermod.pt"
MAX_SETTINGS_BYTES = 16_000_000

_COMPILED = "_orig_mod."
_BLOCK = 1 << 22


def convert(source: Path, destination: Path, base: Path | None = None, chunk_tokens: int | None = None,
            report: Report | None = None) -> DocToLoraConfig | TextToLoraConfig:
    """Convert a Doc-to-LoRA `pytorch_model.bin` or a Text-to-LoRA `hypermod.pt`; `source` is the file or its folder.

    `base` is a folder of the base that the checkpoint is for; its fingerprint is kept, and other bases are refused
    later. `chunk_tokens` says how many tokens of a document are read at once. `destination` comes into being whole or
    not at all.
    Raises CheckpointInvalid, FileNotFoundError, FileExistsError or OSError.
    """
    report = report or _silent
    file = _find(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already")
    fingerprint = fingerprint_folder(base) if base else ""
    origin = Source(file.name, _hash(file, report), file.stat().st_size)
    report("reading", 0, 1)
    found = read_pickle(file)
    report("checking", 0, 1)
    config: DocToLoraConfig | TextToLoraConfig
    if "hypernet_config" in found:
        config, tensors = _doc_to_lora(found, origin, fingerprint, chunk_tokens)
    elif any(key.startswith("heads.") for key in found):
        config, tensors = _text_to_lora(found, file, origin, fingerprint)
    else:
        raise CheckpointInvalid(f"{file.name}: is neither a Doc-to-LoRA checkpoint (it would hold 'hypernet_config') "
                                "nor a Text-to-LoRA one (it would hold 'heads.*')")
    report("writing", 0, 1)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that the last step is a rename.
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        staging.chmod(0o755)
        save(staging, config, tensors)
        staging.replace(destination)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    report("writing", 1, 1)
    return config


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody asked for progress."""


def _find(source: Path) -> Path:
    if not source.is_dir():
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist")
        return source
    for name in (DOC_FILE, TEXT_FILE):
        if (source / name).is_file():
            return source / name
    raise FileNotFoundError(f"{source} holds neither {DOC_FILE} nor {TEXT_FILE}")


def _hash(file: Path, report: Report) -> str:
    digest, done, total = hashlib.sha256(), 0, file.stat().st_size
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            done += len(block)
            report("hashing", done, total)
    return digest.hexdigest()


def _tensors(found: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, without the prefix that torch.compile puts before their names."""
    return {key.removeprefix(_COMPILED): value for key, value in found.items() if isinstance(value, Tensor)}


def _doc_to_lora(found: dict[str, Any], origin: Source, fingerprint: str,
                 chunk_tokens: int | None) -> tuple[DocToLoraConfig, dict[str, Tensor]]:
    tensors = _tensors(found)
    settings = _record(found, "hypernet_config")
    lora, encoder = settings.get("lora_config"), _record(found, "ctx_encoder_args")
    if not isinstance(lora, Record):
        raise CheckpointInvalid("hypernet_config.lora_config: is missing; the scaling is read from it")
    base = found.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointInvalid("base_model_name_or_path: is missing; it names the base that the adapters are for")
    if settings.get("extra_modules"):
        raise CheckpointInvalid(f"hypernet_config.extra_modules: is {settings.get('extra_modules')}; networks that "
                                "make more than LoRA are not supported")
    sizes = DocToLoraSizes.of(tensors)
    for key, value in list(tensors.items()):
        # einops writes the biases of the residual blocks with or without a leading dimension.
        if key.startswith("layers.") and key.endswith(".bias") and value.dim() == 4:
            tensors[key] = value[None]
    with torch.device("meta"):
        model = DocToLora(sizes)
    check(tensors, model)
    reading = _reading(encoder, base, sizes, chunk_tokens)
    # The published code multiplies by alpha itself, where PEFT would divide it by the rank.
    scaling = _number(lora, "lora_alpha", "hypernet_config.lora_config")
    return DocToLoraConfig(base, origin, sizes, reading, scaling, bool(settings.get("use_bias", True)),
                           fingerprint), tensors


def _reading(encoder: Record, base: str, sizes: DocToLoraSizes, chunk_tokens: int | None) -> Reading:
    name = "ctx_encoder_args"
    other = encoder.get("ctx_encoder_model_name_or_path")
    if other not in (None, base):
        raise CheckpointInvalid(f"{name}.ctx_encoder_model_name_or_path: is {other!r}; only networks that read the "
                                f"base itself ({base!r}) are supported")
    kind = encoder.get("ctx_encoder_type")
    if kind not in ACTIVATIONS:
        raise CheckpointInvalid(f"{name}.ctx_encoder_type: is {kind!r}; allowed are {', '.join(ACTIVATIONS)}")
    if sizes.layers > 1 and (kind == PER_LAYER) != sizes.per_layer_activations:
        asked = "a layer" if sizes.per_layer_activations else "all layers"
        raise CheckpointInvalid(f"{name}.ctx_encoder_type: is {kind}, but the decoder's latents are those of {asked}")
    layers = encoder.get("layer_idx")
    if kind == PER_LAYER:
        layers = sizes.layers - 1  # with the embeddings as many activations as layers
    elif kind == EMBEDDINGS:
        layers = 0
    elif kind == EARLY_EXIT and (not isinstance(layers, int) or not 0 < layers <= sizes.layers):
        raise CheckpointInvalid(f"{name}.layer_idx: is {layers!r}; a number from 1 to {sizes.layers} is needed")
    reading = Reading(kind, layers, bool(encoder.get("quantize_ctx_encoder", False)))
    if chunk_tokens is None:
        return reading
    return Reading(kind, layers, reading.quantized, chunk_tokens, max(chunk_tokens, reading.max_tokens))


def _text_to_lora(found: dict[str, Any], file: Path, origin: Source,
                  fingerprint: str) -> tuple[TextToLoraConfig, dict[str, Tensor]]:
    tensors = _tensors(found)
    sizes = TextToLoraSizes.of(tensors)
    with torch.device("meta"):
        model = TextToLora(sizes)
    check(tensors, model)
    folder = _settings_folder(file)
    lora = Record()
    lora.__setstate__(_settings(folder / "adapter_config.json"))
    arguments = _settings(folder / "args.yaml")
    if lora.get("r") != sizes.rank:
        raise CheckpointInvalid(f"adapter_config.json: r: is {lora.get('r')!r}, but the tensors have rank {sizes.rank}")
    base = lora.get("base_model_name_or_path") or arguments.get("model_dir")
    if not isinstance(base, str):
        raise CheckpointInvalid("adapter_config.json: base_model_name_or_path: is missing")
    training = arguments.get("training_task", "sft")
    if training not in TRAININGS:
        raise CheckpointInvalid(f"args.yaml: training_task: is {training!r}; allowed are {' and '.join(TRAININGS)}")
    divisor = arguments.get("delta_w_scaling", 10000)
    if not isinstance(divisor, int | float) or not 0 < divisor < math.inf:
        raise CheckpointInvalid(f"args.yaml: delta_w_scaling: is {divisor!r}; a number above 0 is needed")
    output = OutputScale(training, bool(arguments.get("pred_z_score")), bool(arguments.get("factorized", False)),
                         float(divisor))
    alpha = _number(lora, "lora_alpha", "adapter_config.json")
    scaling = alpha / (math.sqrt(sizes.rank) if lora.get("use_rslora") else sizes.rank)
    return TextToLoraConfig(base.rstrip("/"), origin, sizes, scaling, str(arguments.get("emb_model") or ""), output,
                            fingerprint), tensors


def _settings_folder(file: Path) -> Path:
    """Checkpoints made on the way stand two folders below the run that holds the settings."""
    for folder in (file.parent, *file.parent.parents[:2]):
        if (folder / "args.yaml").is_file() and (folder / "adapter_config.json").is_file():
            return folder
    raise FileNotFoundError(f"{file.parent} holds no args.yaml and adapter_config.json, which a {TEXT_FILE} needs "
                            "beside it")


def _settings(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_SETTINGS_BYTES:
            raise CheckpointInvalid(f"{file.name}: has more than {MAX_SETTINGS_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
        # The safe loader makes plain values only.
        fields = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointInvalid(f"{file.name}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointInvalid(f"{file.name}: holds a {type(fields).__name__}; names and values are needed")
    return fields


def _record(found: dict[str, Any], name: str) -> Record:
    value = found.get(name)
    if not isinstance(value, Record):
        raise CheckpointInvalid(f"{name}: is missing; a Doc-to-LoRA checkpoint has it")
    return value


def _number(record: Record, name: str, where: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointInvalid(f"{where}.{name}: is {value!r}; a finite number above 0 is needed")
    return float(value)
