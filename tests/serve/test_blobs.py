"""The blob store, on a local folder and on fsspec's memory driver (the path that other drivers take)."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from serve.blobs import MANIFEST, BlobCorrupt, BlobError, BlobExists, BlobMissing, BlobStore, verify_folder

PREFIX = "adapters/ten_1/adp_1"


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    if request.param == "file":
        yield BlobStore.open(f"file://{tmp_path}/blobs")
        return
    yield BlobStore.open("memory://blobs")
    memory = fsspec.filesystem("memory")
    if memory.exists("/blobs"):
        memory.rm("/blobs", recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").write_bytes(os.urandom(3_000_000))
    (source / "sub" / "empty.txt").write_bytes(b"")
    return source


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def overwrite(store: BlobStore, name: str, data: bytes) -> None:
    store._fs.pipe_file(f"{store._root}/{PREFIX}/{name}", data)


def test_put_and_fetch(store: BlobStore, folder: Path, tmp_path: Path) -> None:
    assert not store.exists(PREFIX)
    stored = store.put_folder(PREFIX, folder)
    assert store.exists(PREFIX) and stored.size_bytes == 3_000_002 and len(stored.checksum) == 64
    target = tmp_path / "cache" / "adp_1"
    assert store.fetch_folder(PREFIX, target, stored.checksum) == target
    assert contents(target) == contents(folder)
    assert [path.name for path in target.parent.iterdir()] == ["adp_1"], "nothing temporary is left"
    with pytest.raises(BlobExists):
        store.put_folder(PREFIX, folder)


def test_nothing_is_there_until_the_manifest_is(store: BlobStore, folder: Path, tmp_path: Path) -> None:
    store.put_folder(PREFIX, folder)
    store._fs.rm(f"{store._root}/{PREFIX}/{MANIFEST}")
    assert not store.exists(PREFIX)
    with pytest.raises(BlobMissing):
        store.fetch_folder(PREFIX, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store.put_folder(PREFIX, folder)  # a half-written folder does not stand in the way
    assert contents(store.fetch_folder(PREFIX, tmp_path / "out")) == contents(folder)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "not json", "traversal"])
def test_damage_is_found_and_nothing_appears(store: BlobStore, folder: Path, tmp_path: Path, damage: str) -> None:
    checksum: str | None = store.put_folder(PREFIX, folder).checksum
    model = (folder / "adapter_model.safetensors").read_bytes()
    if damage == "flip":
        overwrite(store, "adapter_model.safetensors", model[:-1] + bytes([model[-1] ^ 1]))
    elif damage == "truncate":
        overwrite(store, "adapter_model.safetensors", model[:-1])
    elif damage == "remove":
        store._fs.rm(f"{store._root}/{PREFIX}/adapter_config.json")
    else:
        data = store._read_manifest(PREFIX)
        if damage == "manifest":
            overwrite(store, MANIFEST, data + b" ")
        else:
            checksum = None
            bad = data.replace(b"adapter_config.json", b"../../../evil.json") if damage == "traversal" else b"{"
            overwrite(store, MANIFEST, bad)
    with pytest.raises(BlobCorrupt):
        store.fetch_folder(PREFIX, tmp_path / "cache" / "out", checksum)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "longer", "remove", "manifest", "no manifest"])
def test_damage_of_a_fetched_folder_is_found(store: BlobStore, folder: Path, tmp_path: Path, damage: str) -> None:
    checksum = store.put_folder(PREFIX, folder).checksum
    fetched = store.fetch_folder(PREFIX, tmp_path / "out", checksum)
    verify_folder(fetched, checksum)
    model = fetched / "adapter_model.safetensors"
    if damage == "flip":
        data = model.read_bytes()
        model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "longer":
        model.write_bytes(model.read_bytes() + b"x")
    elif damage == "remove":
        (fetched / "sub" / "empty.txt").unlink()
    elif damage == "manifest":
        (fetched / MANIFEST).write_text('{"format": 1, "files": []}')
    else:
        (fetched / MANIFEST).unlink()
    with pytest.raises(BlobCorrupt):
        verify_folder(fetched, checksum)


def test_what_is_quarantined_cannot_be_fetched_and_can_be_deleted(
    store: BlobStore, folder: Path, tmp_path: Path
) -> None:
    store.put_folder(PREFIX, folder)
    store.quarantine(PREFIX)
    store.quarantine(PREFIX)
    assert not store.exists(PREFIX) and store.list_folders("adapters/ten_1") == ["adp_1"]
    with pytest.raises(BlobMissing):
        store.fetch_folder(PREFIX, tmp_path / "out")
    store.delete_folder(PREFIX)
    assert store.list_folders("adapters/ten_1") == []


def test_delete(store: BlobStore, folder: Path, tmp_path: Path) -> None:
    store.put_folder(PREFIX, folder)
    store.put_folder(f"{PREFIX}0", folder)
    store.delete_folder(PREFIX)
    store.delete_folder(PREFIX)
    assert not store.exists(PREFIX) and store.exists(f"{PREFIX}0"), "a longer name with the same start is another"
    with pytest.raises(BlobMissing):
        store.fetch_folder(PREFIX, tmp_path / "out")


def test_folders_are_listed_whole_and_half_written(store: BlobStore, folder: Path) -> None:
    assert store.list_folders("adapters/ten_1") == []
    with pytest.raises(BlobMissing):
        store.last_written(PREFIX)
    started = time.time()
    store.put_folder(PREFIX, folder)
    store.put_folder("adapters/ten_1/adp_2", folder)
    store.put_folder("adapters/ten_2/adp_3", folder)
    store._fs.rm(f"{store._root}/{PREFIX}/{MANIFEST}")
    assert store.list_folders("adapters/ten_1") == ["adp_1", "adp_2"]
    assert started - 2 < store.last_written(PREFIX) < time.time() + 2


def test_many_fetch_the_same_folder_at_once(folder: Path, tmp_path: Path) -> None:
    store = BlobStore.open(f"file://{tmp_path}/blobs")  # files of the memory driver share one read position
    checksum = store.put_folder(PREFIX, folder).checksum
    target = tmp_path / "cache" / "adp_1"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: contents(store.fetch_folder(PREFIX, target, checksum)), range(8)))
    assert found == [contents(folder)] * 8
    assert [path.name for path in target.parent.iterdir()] == ["adp_1"]


@pytest.mark.parametrize("bad", ["", "/etc", "..", "a/../b", "a//b", "a/", ".hidden", "a b", "a\n", "a\x00"])
def test_prefixes_stay_under_the_root(store: BlobStore, folder: Path, bad: str) -> None:
    for action in (store.exists, store.delete_folder, lambda prefix: store.put_folder(prefix, folder)):
        with pytest.raises(BlobError):
            action(bad)


def test_links_reserved_names_and_empty_folders_are_refused(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "bad"
    source.mkdir()
    with pytest.raises(BlobError, match="empty"):
        store.put_folder(PREFIX, source)
    (source / MANIFEST).write_text("{}")
    with pytest.raises(BlobError, match="own"):
        store.put_folder(PREFIX, source)
    (source / MANIFEST).unlink()
    (source / "link").symlink_to("/etc/passwd")
    with pytest.raises(BlobError, match="plain"):
        store.put_folder(PREFIX, source)
    assert not store.exists(PREFIX)


def test_the_local_root_is_private(tmp_path: Path) -> None:
    BlobStore.open(f"file://{tmp_path}/blobs")
    assert stat.S_IMODE((tmp_path / "blobs").stat().st_mode) == 0o700
