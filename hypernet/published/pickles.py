"""Reads a torch.save file without running code from it.

torch's restricted unpickler knows tensors and plain containers. Checkpoints of Doc-to-LoRA also hold objects of
upstream's configuration classes; each of those names is mapped to `Record`, which only keeps fields. A file that
names anything else is refused before a byte of its pickle is interpreted.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypernet.published.errors import CheckpointInvalid

FOREIGN: Mapping[str, frozenset[str]] = {
    "ctx_to_lora": frozenset({
        "HypernetConfig", "HypernetArguments", "AggregatorConfig", "AggregatorArguments", "CtxEncoderArguments",
        "AGGREGATOR_TYPE", "CTX_ENCODER_TYPE", "POOL_FN"}),
    "peft": frozenset({
        "LoraConfig", "LoraRuntimeConfig", "LoftQConfig", "EvaConfig", "CordaConfig", "PeftType", "TaskType"}),
}
"""By top-level package: the classes whose objects become records, wherever in the package they stand."""


MAX_REPEATS = 16
"""How often over the tensors of a file may use its bytes."""


class Record:
    """Stands for an object of a foreign class: what it was made from and the state it was given, unread."""

    args: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *args: Any) -> Record:
        """Called by the unpickler instead of the foreign class."""
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise CheckpointInvalid(f"a configuration object has {type(state).__name__} as its fields; a dictionary "
                                    "is needed")
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """A field; an enumeration's member comes as its value."""
        value = self.state.get(name, default)
        if isinstance(value, Record) and not value.state and len(value.args) == 1:
            return value.args[0]
        return value


def read_pickle(file: Path) -> dict[str, Any]:
    """The dictionary in a torch.save file: tensors on the CPU, plain values and Records.

    Raises CheckpointInvalid where the file is corrupt, names code, or claims more values than it holds, and OSError
    where it cannot be read.
    """
    _check_archive(file)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except OSError:
        raise
    except Exception as error:  # hostile bytes can make the scanner fail in any way
        raise CheckpointInvalid(f"{file.name}: cannot be read as a torch.save file: {error}") from error
    refused = sorted(name for name in names if not _known(name))
    if refused:
        raise CheckpointInvalid(f"{file.name}: refused, since it names {', '.join(refused)}; only tensors, plain "
                                "values and the configuration classes of Doc-to-LoRA and PEFT are allowed")
    try:
        # From torch 2.5 on a pair maps a name to a class of ours.
        allowed: list[Any] = [(Record, name) for name in names]
        with torch.serialization.safe_globals(allowed):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (CheckpointInvalid, OSError):
        raise
    except Exception as error:  # as above
        raise CheckpointInvalid(f"{file.name}: cannot be read as a torch.save file: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointInvalid(f"{file.name}: holds a {type(found).__name__}; a dictionary with names is needed")
    _check_tensors(file, found)
    return found


def _known(name: str) -> bool:
    package, _, rest = name.partition(".")
    return rest.rpartition(".")[2] in FOREIGN.get(package, ())


def _check_archive(file: Path) -> None:
    """torch.save writes a zip archive whose members are stored as they are; checksums tell corruption."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file")
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
            broken = None if packed else archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointInvalid(f"{file.name}: is no torch.save file, or a truncated one: {error}") from error
    if packed:
        raise CheckpointInvalid(f"{file.name}: {packed[0]} is compressed; torch.save stores its members as they are")
    if broken:
        raise CheckpointInvalid(f"{file.name}: {broken} is corrupt: its checksum does not match")


def _check_tensors(file: Path, found: dict[str, Any]) -> None:
    """Refuse tensors that are not dense, and strides that repeat few bytes into terabytes."""
    room, used = file.stat().st_size, 0
    # Layers that share weights hold the same bytes several times.
    for key, value in found.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointInvalid(f"{key}: is a {value.layout} tensor on {value.device.type}; a dense one is needed")
        size = value.numel() * value.element_size()
        used += size
        if size > room or used > MAX_REPEATS * room:
            raise CheckpointInvalid(f"{key}: has shape {tuple(value.shape)}, more than a file of {room} bytes holds")
