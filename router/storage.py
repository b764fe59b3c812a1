"""Segments on disk: written once, checked as a whole before use, mapped into memory.

    <folder>/state.json         the change that all of this is as new as, its segments, and which entries are gone
    <folder>/<segment>/*.npy    columns; large ones are mapped
    <folder>/<segment>/neighbours.faiss
    <folder>/<segment>/manifest.json    size and SHA-256 of every other file

Both JSON files carry a checksum of themselves. Files are never changed after they are in place, and a state takes the
place of the one before by renaming, so a crash leaves the old state or the new one.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from router.embed import Vectors
from router.lexical import Words
from router.neighbours import Neighbours
from router.ragged import Ragged
from router.segment import Columns, Segment

FORMAT = 1
"""To be raised when the layout changes or `router.text.words` finds other words in the same text."""
_STATE, _MANIFEST, _NEIGHBOURS, _LOCK = "state.json", "manifest.json", "neighbours.faiss", "lock"
_VECTORS = "columns.vectors.npy"
_MAPPED_BYTES = 1 << 20
_NESTED = {"columns": Columns, "words": Words}
_RAGGED = frozenset({"adapter_ids", "document_ids", "titles", "held", "headings", "title_only", "found"})
_VALUES = frozenset({"tenant_id", "collection_ids"})
T = TypeVar("T")


class IndexDamaged(Exception):
    """What is on disk is incomplete, altered or of another format. Rebuild from the source."""


class MappedFiles:
    """The open files behind a segment's mapped arrays."""

    def __init__(self, files: Sequence[tuple[BinaryIO, int]]) -> None:
        self._files = list(files)

    def check(self) -> None:
        """Raise IndexDamaged where a file has shrunk, for reading past its end would end the process."""
        for file, size in self._files:
            if os.fstat(file.fileno()).st_size != size:
                raise IndexDamaged(f"{file.name} has changed its size")


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A segment that is on disk: under which name, what holds its files open, and which entries were alive then."""

    name: str
    segment: Segment
    files: MappedFiles
    alive: npt.NDArray[np.bool_]


class SegmentFolder:
    """One tenant's segments on disk. Replicas on one machine may share it."""

    def __init__(self, folder: Path, tenant_id: str, encoder: str, dimension: int) -> None:
        """`encoder` names the encoder and its version: segments of another one are as good as none."""
        self._folder = folder
        self._owner = {"format": FORMAT, "tenant_id": tenant_id, "encoder": encoder, "dimension": dimension}

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder to write a segment into, removed in the end unless `write` has put it in place."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="writing-", dir=self._folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, staging: Path, segment: Segment) -> Stored:
        """Put a segment in place, whose vectors `vectors_file` holds already, and map it. Raises OSError."""
        values: dict[str, Any] = {}
        for name, value in _flat(segment):
            if name in _VALUES or name.split(".")[-1] in _VALUES:
                values[name] = list(value) if isinstance(value, tuple) else value
            elif f"{name}.npy" != _VECTORS:
                np.save(staging / f"{name}.npy", value)
        if segment.neighbours is not None:
            segment.neighbours.save(staging / _NEIGHBOURS)
            values["probes"] = segment.neighbours.probes
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in staging.iterdir()}
        _write_json(staging / _MANIFEST, {"format": FORMAT, "values": values, "files": files})
        name = f"segment-{staging.name.removeprefix('writing-')}"
        with self._locked():
            staging.rename(self._folder / name)
        return self._read(name, np.ones(len(segment), bool), checked=False)

    def commit(self, seq: int, segments: Sequence[tuple[str, npt.NDArray[np.bool_]]]) -> None:
        """Make these segments, with the entries of each that are alive, the state; remove all others."""
        listed = [
            {"name": name, "alive": base64.b64encode(np.packbits(alive).tobytes()).decode()} for name, alive in segments
        ]
        with self._locked():
            _write_json(self._folder / _STATE, {**self._owner, "seq": seq, "segments": listed})
            kept = {name for name, _ in segments}
            for path in self._folder.glob("segment-*"):
                if path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)  # who has mapped it keeps it until he lets go

    def read(self) -> tuple[int, list[Stored]] | None:
        """The state: its change number and its segments; None where there is none. Raises IndexDamaged."""
        if not (self._folder / _STATE).exists():
            return None
        with self._locked():
            state = _read_json(self._folder / _STATE)
            if {key: state.get(key) for key in self._owner} != self._owner:
                raise IndexDamaged(f"{self._folder} was written for {[state.get(key) for key in self._owner]}")
            segments = []
            for one in state["segments"]:
                bits = np.unpackbits(np.frombuffer(base64.b64decode(one["alive"]), np.uint8)).astype(bool)
                segments.append(self._read(one["name"], bits, checked=True))
            return int(state["seq"]), segments

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, name: str, alive: npt.NDArray[np.bool_], checked: bool) -> Stored:
        folder = self._folder / name
        manifest = _read_json(folder / _MANIFEST)
        if manifest.get("format") != FORMAT:
            raise IndexDamaged(f"{folder} has format {manifest.get('format')}")
        open_files = []
        try:
            for file_name, expected in manifest["files"].items():
                path = folder / file_name
                if path.stat().st_size != expected["bytes"] or checked and _sha256(path) != expected["sha256"]:
                    raise IndexDamaged(f"{path} is not what was written")
                if _is_mapped(path):
                    open_files.append((path.open("rb"), expected["bytes"]))
            values = manifest["values"]
            neighbours = Neighbours.load(folder / _NEIGHBOURS, values["probes"]) if "probes" in values else None
            segment = _load(Segment, "", folder, {**values, "neighbours": neighbours})
        except (OSError, KeyError, ValueError) as error:
            raise IndexDamaged(f"{folder}: {error}") from error
        return Stored(name, segment, MappedFiles(open_files), alive[: len(segment)])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def vectors_file(staging: Path, rows: int, dimension: int) -> Vectors:
    """Where the vectors of a segment that is being made are written: float32 [rows, dimension]."""
    return np.lib.format.open_memmap(staging / _VECTORS, "w+", np.float32, (rows, dimension))


def memory_bytes(segment: Segment, mapped: bool) -> int:
    """Bytes of memory of a segment; with `mapped` without what is read from files as it is needed."""
    sizes = [value.nbytes for _, value in _flat(segment) if isinstance(value, np.ndarray)]
    if mapped:
        return sum(size for size in sizes if size <= _MAPPED_BYTES)
    return sum(sizes) + (segment.neighbours.nbytes if segment.neighbours is not None else 0)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays and plain values of a dataclass by dotted name."""
    for field in fields(value):
        name, inner = f"{prefix}{field.name}", getattr(value, field.name)
        if is_dataclass(inner):
            yield from _flat(inner, f"{name}.")
        elif field.name != "neighbours":
            yield name, inner


def _load(kind: type[T], prefix: str, folder: Path, values: Mapping[str, Any]) -> T:
    """The reverse of `_flat`."""
    made: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = f"{prefix}{field.name}"
        if field.name in _NESTED:
            made[field.name] = _load(_NESTED[field.name], f"{name}.", folder, values)
        elif field.name in _RAGGED:
            made[field.name] = _load(Ragged, f"{name}.", folder, values)
        elif name in values:
            made[field.name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
        else:
            path = folder / f"{name}.npy"
            # A plain array over the mapped file: numpy's own class for it is slow at every step.
            made[field.name] = np.asarray(np.load(path, mmap_mode="r" if _is_mapped(path) else None))
    return kind(**made)


def _is_mapped(path: Path) -> bool:
    return path.name == _NEIGHBOURS or path.suffix == ".npy" and path.stat().st_size > _MAPPED_BYTES


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    text = json.dumps(body, sort_keys=True)
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        file.write(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}, sort_keys=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        body: dict[str, Any] = found["body"]
        right = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() == found["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IndexDamaged(f"{path}: {error}") from error
    if not right:
        raise IndexDamaged(f"{path} does not have its checksum")
    return body
