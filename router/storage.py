"""Segments on disk: written once, checked as a whole before use, mapped into memory.

    <folder>/state.json         the change that all of this is as new as, its segments, which of their entries are gone,
                                and since when
    <folder>/<segment>/*.npy    columns; large ones are mapped
    <folder>/<segment>/neighbours.faiss
    <folder>/<segment>/manifest.json    size and SHA-256 of every other file

Both JSON files carry a checksum of themselves. Files are never changed after they are in place, and a state takes the
place of the one before by renaming, so a crash leaves the old state or the new one.

Entries that are gone stay in the files of their segment until that is written anew without them; `DiskState` tells who
looks after that what is there. A file that is removed is gone from the folder at once, and from the disk when the last
process that has it mapped lets go.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from router.embed import Vectors
from router.lexical import Words, find, term
from router.neighbours import Neighbours
from router.ragged import Ragged
from router.segment import Columns, Segment

FORMAT = 2
"""To be raised when the layout changes or `router.text.words` finds other words in the same text."""
_STATE, _MANIFEST, _NEIGHBOURS, _LOCK = "state.json", "manifest.json", "neighbours.faiss", "lock"
_VECTORS = "columns.vectors.npy"
_ADAPTER_KEYS = "adapter_keys.npy"
_SEGMENT, _WRITING = "segment-", "writing-"
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
    """A segment that is on disk: under which name, what holds its files open, which entries were alive then, and since
    when others were gone, see `Listed`."""

    name: str
    segment: Segment
    files: MappedFiles
    alive: npt.NDArray[np.bool_]
    gone_since: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """A segment of a state: its name on disk, which entries are alive (bool [entries]), and when, in seconds since the
    epoch, the first of the others went (None: none has)."""

    name: str
    alive: npt.NDArray[np.bool_]
    gone_since: float | None = None


@dataclass(frozen=True, slots=True)
class DiskState:
    """What a folder's state says of itself: the change that it is as new as, its segments' names, and when the first
    of the entries went that are gone but still in their files (seconds since the epoch; None: there are none)."""

    seq: int
    names: frozenset[str]
    gone_since: float | None


class SegmentFolder:
    """One tenant's segments on disk. Replicas on one machine may share it.

    Each replica writes segments of its own; the state names those of the replica that wrote it last, and all others
    are removed. Who has them mapped goes on with them, but cannot name them in a state any more.
    """

    def __init__(self, folder: Path, tenant_id: str, encoder: str, dimension: int) -> None:
        """`encoder` names the encoder and its version: segments of another one are as good as none."""
        self._folder = folder
        self._owner = {"format": FORMAT, "tenant_id": tenant_id, "encoder": encoder, "dimension": dimension}

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder to write a segment into, removed in the end unless `write` has put it in place."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=self._folder))
        mine = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(mine, fcntl.LOCK_EX)  # for as long as its writer lives, see `remove_leftovers`
            yield folder
        finally:
            os.close(mine)
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
        name = f"{_SEGMENT}{staging.name.removeprefix(_WRITING)}"
        with locked(self._folder):
            staging.rename(self._folder / name)
        return self._read(name, np.ones(len(segment), bool), checked=False)

    def commit(self, seq: int, segments: Sequence[Listed]) -> bool:
        """Make these segments the state and remove all others.

        False where another replica has removed some of them: its state stays, and those of these segments that it does
        not name are removed.
        """
        listed = [
            {"name": one.name, "alive": base64.b64encode(np.packbits(one.alive).tobytes()).decode(),
             "gone_since": one.gone_since}
            for one in segments
        ]
        names = {one.name for one in segments}
        with locked(self._folder):
            whole = all((self._folder / name).is_dir() for name in names)
            if whole:
                _write_json(self._folder / _STATE, {**self._owner, "seq": seq, "segments": listed})
            else:
                names = set(_names(self._folder))
            _remove_segments(self._folder, names)
        return whole

    def has_state(self) -> bool:
        """Whether a state, of whatever replica, is on disk."""
        return (self._folder / _STATE).exists()

    def existing(self, names: Iterable[str]) -> set[str]:
        """Those of these segments that are still there."""
        return {name for name in names if (self._folder / name).is_dir()}

    def read(self) -> tuple[int, list[Stored]] | None:
        """The state: its change number and its segments; None where there is none. Raises IndexDamaged."""
        if not self.has_state():
            return None
        with locked(self._folder):
            state = _read_json(self._folder / _STATE)
            if {key: state.get(key) for key in self._owner} != self._owner:
                raise IndexDamaged(f"{self._folder} was written for {[state.get(key) for key in self._owner]}")
            segments = []
            for one in state["segments"]:
                bits = np.unpackbits(np.frombuffer(base64.b64decode(one["alive"]), np.uint8)).astype(bool)
                stored = self._read(one["name"], bits, checked=True)
                segments.append(replace(stored, gone_since=one["gone_since"]))
            return int(state["seq"]), segments

    def remove(self) -> None:
        """Delete everything."""
        remove_folder(self._folder)

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
def locked(folder: Path) -> Iterator[None]:
    """Nobody else changes what is in the folder meanwhile; it is made where it is not there. Raises OSError."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_file(folder / _LOCK, lock):
                yield
                return
        # Somebody has removed the folder while this waited, and with it the lock that others know.


def remove_folder(folder: Path) -> None:
    """Delete a tenant's folder. Whoever has files of it mapped keeps them until he lets go."""
    if folder.is_dir():
        with locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def disk_state(folder: Path) -> DiskState | None:
    """What a tenant's folder holds, whatever the encoder; None where there is no state. Raises IndexDamaged."""
    if not (folder / _STATE).exists():
        return None
    with locked(folder):
        state = _read_json(folder / _STATE)
        if state.get("format") != FORMAT:
            raise IndexDamaged(f"{folder} has format {state.get('format')}")
        names = frozenset(one["name"] for one in state["segments"])
        if missing := sorted(name for name in names if not (folder / name).is_dir()):
            raise IndexDamaged(f"{folder} lacks {missing}")
    since = [one["gone_since"] for one in state["segments"] if one["gone_since"] is not None]
    return DiskState(int(state["seq"]), names, min(since, default=None))


def holds_any(folder: Path, state: DiskState, adapter_ids: Sequence[str]) -> bool:
    """Whether the files of a state hold an entry of any of these adapters, alive or gone. Raises IndexDamaged."""
    wanted = np.fromiter(map(term, adapter_ids), np.uint64, len(adapter_ids))
    try:
        keys = [np.load(folder / name / _ADAPTER_KEYS, mmap_mode="r") for name in state.names]
    except (OSError, ValueError) as error:
        raise IndexDamaged(f"{folder}: {error}") from error
    return any(bool((find(one, wanted) >= 0).any()) for one in keys)


def remove_leftovers(folder: Path, before: float) -> None:
    """Remove what killed or outdone processes have left in a tenant's folder before this time (seconds since the
    epoch): segments that no state names, and such as nobody goes on writing. Raises IndexDamaged."""
    with locked(folder):
        kept = set(_names(folder))
        kept |= {path.name for path in folder.glob(f"{_SEGMENT}*") if _changed_at(path) >= before}
        _remove_segments(folder, kept)
        for path in folder.glob(f"{_WRITING}*"):
            if _changed_at(path) < before and not _is_held(path):
                shutil.rmtree(path, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    """The segments of the state that is in a folder; none without a state. The folder is locked."""
    return [one["name"] for one in _read_json(folder / _STATE)["segments"]] if (folder / _STATE).exists() else []


def _remove_segments(folder: Path, kept: Collection[str]) -> None:
    for path in folder.glob(f"{_SEGMENT}*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)  # who has mapped it keeps it until he lets go


def _is_file(path: Path, opened: IO[Any]) -> bool:
    """Whether this open file is the one that is at the path now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False


def _changed_at(path: Path) -> float:
    """When something was last put into a folder, in seconds since the epoch; now where it has gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _is_held(staging: Path) -> bool:
    """Whether somebody is writing in this folder, see `SegmentFolder.staged`."""
    try:
        tried = os.open(staging, os.O_RDONLY)
    except FileNotFoundError:
        return True  # it is being removed, or has become a segment
    try:
        fcntl.flock(tried, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(tried)
    return False


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
