"""Immutable folders of files (adapters) in any place that fsspec can reach.

A folder is put once and never changed. Its manifest is written last, so a folder without one does not exist yet; the
manifest's SHA-256 is the folder's checksum, and the manifest in turn has the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

MANIFEST = "imprint-manifest.json"
QUARANTINED_MANIFEST = "imprint-manifest.quarantined.json"
_CHUNK = 1 << 20
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class BlobError(Exception):
    """Base of the blob store's own errors. Those of the storage itself (OSError and the like) pass through."""


class BlobMissing(BlobError):
    """There is no complete folder under this prefix."""


class BlobExists(BlobError):
    """There is a complete folder under this prefix already; folders never change."""


class BlobCorrupt(BlobError):
    """What is stored is not what was put: a checksum, size or manifest does not fit."""


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """`checksum` is SHA-256 (hex) of the manifest; `size_bytes` that of all files together, without it."""

    prefix: str
    checksum: str
    size_bytes: int


class BlobStore:
    """Folders under one root. Synchronous and safe to share between threads."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._local = isinstance(filesystem, LocalFileSystem)
        if self._local:
            Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)

    @classmethod
    def open(cls, url: str, **options: Any) -> BlobStore:
        """`url` is fsspec's: `file:///path` (made when missing), `s3://bucket/path`, …; `options` go to its driver."""
        filesystem, root = fsspec.core.url_to_fs(url, **options)
        return cls(filesystem, root)

    def put_folder(self, prefix: str, local_dir: Path) -> StoredFolder:
        """Store all files of a folder, durably. Raises BlobExists, and BlobError for links or an empty folder."""
        if self.exists(prefix):
            raise BlobExists(f"{prefix} is stored already")
        entries: list[dict[str, Any]] = []
        for path in sorted(local_dir.rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BlobError(f"{path.name} is not a plain file")
            if path.is_dir():
                continue
            name = path.relative_to(local_dir).as_posix()
            _check_name(name)
            if name == MANIFEST:
                raise BlobError(f"{MANIFEST} is a name of the store's own")
            with path.open("rb") as source:
                size, digest = self._write(f"{prefix}/{name}", source)
            entries.append({"path": name, "size": size, "sha256": digest})
        if not entries:
            raise BlobError("an empty folder cannot be stored")
        manifest = json.dumps({"format": 1, "files": entries}, indent=1, sort_keys=True).encode()
        self._write(f"{prefix}/{MANIFEST}", BytesIO(manifest))
        return StoredFolder(prefix, hashlib.sha256(manifest).hexdigest(), sum(entry["size"] for entry in entries))

    def fetch_folder(self, prefix: str, local_dir: Path, checksum: str | None = None) -> Path:
        """Copy a folder's files and manifest to `local_dir`, which appears complete or not at all; returns it.

        Every byte is checked against the manifest, and the manifest against `checksum` if given. A `local_dir` that
        is there already was fetched by someone before and is left as it is. Raises BlobMissing, BlobCorrupt.
        """
        if local_dir.is_dir():
            return local_dir
        manifest = self._read_manifest(prefix)
        files = _files(prefix, manifest, checksum)
        part = local_dir.parent / f".{local_dir.name}.{secrets.token_hex(8)}.part"
        part.mkdir(parents=True)
        try:
            for entry in files:
                self._fetch_file(prefix, entry, part)
            (part / MANIFEST).write_bytes(manifest)
            _sync_folder(part)
            try:
                os.rename(part, local_dir)
            except OSError:
                if not local_dir.is_dir():  # else another fetch was faster, with the same files
                    raise
            _sync_folder(local_dir.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return local_dir

    def delete_folder(self, prefix: str) -> None:
        """Remove a folder, whole or half-written; nothing happens when there is none."""
        path = self._path(prefix)
        # Without its manifest it is gone for everyone, should we be stopped between the two steps.
        for victim, recursive in ((f"{path}/{MANIFEST}", False), (path, True)):
            try:
                self._fs.rm(victim, recursive=recursive)
            except FileNotFoundError:
                continue

    def quarantine(self, prefix: str) -> None:
        """Set a damaged folder aside: nobody can fetch it any more, and its files stay until `delete_folder`.

        Its manifest gets another name. Nothing happens when there is no complete folder.
        """
        path = self._path(prefix)
        try:
            self._fs.mv(f"{path}/{MANIFEST}", f"{path}/{QUARANTINED_MANIFEST}")
        except FileNotFoundError:
            return

    def exists(self, prefix: str) -> bool:
        """Whether a complete folder is there."""
        try:
            self._read_manifest(prefix)
        except BlobMissing:
            return False
        return True

    def list_folders(self, prefix: str) -> list[str]:
        """Names of the folders right below a prefix, whole and half-written ones; none when there is no such prefix."""
        try:
            entries = self._fs.ls(self._path(prefix), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")

    def last_written(self, prefix: str) -> float:
        """When anything in a folder, whole or half-written, was last written, in seconds since the epoch.

        Raises BlobMissing when there is nothing, NotImplementedError when the storage keeps no times.
        """
        path = self._path(prefix)
        if self._local:
            folder = Path(path)
            times = [place.stat().st_mtime for place in (folder, *folder.rglob("*"))] if folder.is_dir() else []
        else:
            times = [self._fs.modified(name).timestamp() for name in self._fs.find(path)]
        if not times:
            raise BlobMissing(f"{prefix} is not stored")
        return max(times)

    def _path(self, prefix: str) -> str:
        _check_name(prefix)
        return f"{self._root}/{prefix}"

    def _read_manifest(self, prefix: str) -> bytes:
        try:
            # Read rather than look it up: some drivers answer look-ups from a listing that may be old.
            data: bytes = self._fs.cat_file(f"{self._path(prefix)}/{MANIFEST}")
        except FileNotFoundError as error:
            raise BlobMissing(f"{prefix} is not stored") from error
        return data

    def _fetch_file(self, prefix: str, entry: dict[str, Any], part: Path) -> None:
        target = part / PurePosixPath(entry["path"])
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._fs.open(f"{self._path(prefix)}/{entry['path']}", "rb") as source, target.open("wb") as sink:
                size, digest = _copy(source, sink)
                sink.flush()
                os.fsync(sink.fileno())
        except FileNotFoundError as error:
            raise BlobCorrupt(f"{prefix} lacks its file {entry['path']}") from error
        if size != entry["size"] or digest != entry["sha256"]:
            raise BlobCorrupt(f"{entry['path']} of {prefix} is not what was stored")

    def _write(self, name: str, source: BinaryIO) -> tuple[int, str]:
        """Store one file; returns its size and SHA-256. On a local disk it is synced before it gets its name."""
        path = self._path(name)
        if not self._local:
            with self._fs.open(path, "wb") as sink:
                return _copy(source, sink)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        try:
            with part.open("wb") as sink:
                result = _copy(source, sink)
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        # The folder's own entry, and those of the folders that mkdir made above it.
        for folder in (target.parent, *target.parent.parents):
            _sync_folder(folder)
            if folder == Path(self._root):
                break
        return result


def verify_folder(local_dir: Path, checksum: str) -> None:
    """Check every byte of a fetched folder against its manifest, and that against `checksum`. Raises BlobCorrupt."""
    try:
        manifest = (local_dir / MANIFEST).read_bytes()
        for entry in _files(local_dir.name, manifest, checksum):
            with (local_dir / entry["path"]).open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise BlobCorrupt(f"{entry['path']} of {local_dir.name} is not what was stored")
    except FileNotFoundError as error:
        raise BlobCorrupt(f"{local_dir.name} lacks {error.filename}") from error


def _files(name: str, manifest: bytes, checksum: str | None) -> list[dict[str, Any]]:
    """The entries of a manifest. Raises BlobCorrupt."""
    if checksum is not None and hashlib.sha256(manifest).hexdigest() != checksum:
        raise BlobCorrupt(f"the manifest of {name} does not have the checksum that was recorded")
    try:
        decoded = json.loads(manifest)
        files = [
            {"path": str(entry["path"]), "size": int(entry["size"]), "sha256": str(entry["sha256"])}
            for entry in decoded["files"]
        ]
        if decoded["format"] != 1:
            raise BlobCorrupt(f"the manifest of {name} has an unknown format")
        for entry in files:
            _check_name(str(entry["path"]))
    except (ValueError, KeyError, TypeError, BlobError) as error:
        raise BlobCorrupt(f"the manifest of {name} cannot be read: {error}") from error
    return files


def _check_name(name: str) -> None:
    """Refuse names that could leave the store's root or mean different things to different drivers."""
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise BlobError(f"{name!r} is not a relative path of plain names")


def _copy(source: BinaryIO, sink: BinaryIO) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    while chunk := source.read(_CHUNK):
        sink.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
