"""Blobs: named by their bytes, stored once, durable, and never returned damaged."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.blobs import BlobStore
from ledger.errors import BlobError, LedgerError


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_put_then_get(tmp_path_factory: pytest.TempPathFactory, items: list[bytes]) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs") / "store")
    names = [store.put(item) for item in items]
    assert names == [hashlib.sha256(item).hexdigest() for item in items]
    assert [BlobStore(store.root).get(name) for name in names] == items
    assert list(store.names()) == sorted(set(names))
    assert all(name in store for name in names)
    assert store.verify() == []


def test_a_blob_is_synced_before_it_has_a_name_and_its_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(fd: int) -> None:
        target = Path(f"/proc/self/fd/{fd}").readlink()
        events.append(f"sync {target.name if target.is_dir() else 'data'}")
        fsync(fd)

    def note_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    name = BlobStore(tmp_path / "store").put(b"content")
    assert events[-3:] == ["sync data", "rename", f"sync {name[:2]}"]
    assert {f"sync {tmp_path.name}", "sync store"} <= set(events)


def test_a_second_put_writes_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    name = store.put(b"once")
    before = store.path(name).stat()
    assert store.put(b"once") == name
    assert store.path(name).stat().st_ino == before.st_ino
    assert [item.name for item in store.path(name).parent.iterdir()] == [name]


def test_damage_is_reported_never_returned_and_healed_by_put(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    name, other = store.put(b"good"), store.put(b"untouched")
    store.path(name).chmod(0o644)
    store.path(name).write_bytes(b"goo")
    with pytest.raises(BlobError, match="damaged"):
        store.get(name)
    (problem,) = store.verify()
    assert name in problem
    assert store.put(b"good") == name
    assert store.get(name) == b"good" and store.get(other) == b"untouched"
    assert store.verify() == []


def test_what_is_not_there(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "none")
    assert list(store.names()) == [] and "0" * 64 not in store
    with pytest.raises(BlobError, match="is not in"):
        store.get("0" * 64)
    for wrong in ("", "0" * 63, "../../etc/passwd", "A" * 64):
        with pytest.raises(BlobError, match="64"):
            store.get(wrong)


def test_a_killed_writer_leaves_no_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    name = store.put(b"whole")
    (store.path(name).parent / f".{name}.1-abc.tmp").write_bytes(b"who")
    assert list(store.names()) == [name] and store.verify() == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot store a blob"):
        BlobStore(tmp_path / "file").put(b"x")
