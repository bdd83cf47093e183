"""Damage to the ledger's bytes: a torn write is mended and nothing is lost, anything else is refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ledger.errors import LedgerCorrupt
from ledger.records import Note
from ledger.store import Ledger
from ledger.verify import verify
from tests.ledger.plain import forge_after, read_chain, read_file
from tests.ledger.samples import fill


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "ledger.jsonl"
    fill(Ledger(path), 5)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here bytes are judged, not durability: spare the disk a few thousand flushes."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def starts(data: bytes) -> list[int]:
    return [0] + [i + 1 for i, byte in enumerate(data) if byte == 10]


def torn_bytes(path: Path) -> list[bytes]:
    """The torn bytes that repair records carry, checked against their hash."""
    found: list[bytes] = []
    for record in read_file(path):
        if record["type"] == "ledger.repair":
            body = record["body"]
            torn = bytes.fromhex(body["torn_hex"])
            if body["sidecar"]:
                torn = (path.parent / body["sidecar"]).read_bytes()
            assert hashlib.sha256(torn).hexdigest() == body["sha256"] and len(torn) == body["torn_bytes"]
            found.append(torn)
    return found


def test_cut_at_every_byte_of_the_last_two_records(whole: bytes, tmp_path: Path) -> None:
    *_, third_last, second_last, _end = starts(whole)
    begin = starts(whole)[-3]
    assert (third_last, second_last) == tuple(starts(whole)[-3:-1])
    path = tmp_path / "ledger.jsonl"
    for cut in range(begin, len(whole) + 1):
        for stray in tmp_path.iterdir():
            stray.unlink()
        path.write_bytes(whole[:cut])
        Ledger(path).append("note", Note(text="after"))
        kept = whole[: whole.rindex(b"\n", 0, cut) + 1]
        tail = whole[len(kept) : cut]
        mended = whole[cut : cut + 1] == b"\n"  # only the newline was missing
        data = path.read_bytes()
        assert data.startswith(kept + (tail + b"\n" if mended else b"")), cut
        types = [record["type"] for record in read_chain(data)]
        before = kept.count(b"\n") + (1 if mended else 0)
        assert types[before:] == (["note"] if mended or not tail else ["ledger.repair", "note"]), cut
        assert torn_bytes(path) == ([] if mended or not tail else [tail]), cut
        assert verify(path).ok
        assert sorted(item.name for item in tmp_path.iterdir()) == ["ledger.jsonl", "ledger.jsonl.lock"]


def test_cut_inside_the_genesis_record(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(whole[:40])
    Ledger(path).append("note", Note(text="after"))
    assert [record["type"] for record in read_file(path)] == ["ledger.genesis", "ledger.repair", "note"]
    assert torn_bytes(path) == [whole[:40]]


def test_long_torn_bytes_go_to_a_sidecar_that_stays(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    torn = b'{"v":1,"body":"' + b"y" * 20_000
    path.write_bytes(whole + torn)
    Ledger(path).append("note", Note(text="after"))
    for _ in range(2):  # a second opening must not record them again
        assert torn_bytes(path) == [torn]
        Ledger(path).append("note", Note(text="more"))
    assert len(list(tmp_path.glob("*.torn-*"))) == 1


def test_blocks_that_were_never_written_after_a_power_cut(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(whole[:-1] + bytes(300))  # the newline and more never reached the disk
    Ledger(path).append("note", Note(text="after"))
    assert path.read_bytes().startswith(whole)
    assert torn_bytes(path) == [bytes(300)]


def test_a_repair_killed_at_any_step_is_finished_by_the_next(whole: bytes, tmp_path: Path) -> None:
    torn = whole[: starts(whole)[1]][:50]
    name = f"ledger.jsonl.torn-{hashlib.sha256(torn).hexdigest()[:16]}"
    path = tmp_path / "ledger.jsonl"
    # Killed after the sidecar, before the cut; after the cut; after a torn repair record.
    again = b'{"v":1,"s'
    for content, expected in ((whole + torn, [torn]), (whole, [torn]), (whole + again, [torn, again])):
        for stray in tmp_path.iterdir():
            stray.unlink()
        path.write_bytes(content)
        (tmp_path / name).write_bytes(torn)
        Ledger(path).append("note", Note(text="after"))
        assert path.read_bytes().startswith(whole)
        assert sorted(torn_bytes(path)) == sorted(expected)
        assert not list(tmp_path.glob("*.torn-*"))


def test_every_flipped_byte_is_found_and_nothing_is_written(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for where in range(len(whole)):
        for flip in (0x01, 0x80) if where % 3 else (0x20,):
            damaged = bytearray(whole)
            damaged[where] ^= flip
            path.write_bytes(damaged)
            report = verify(path)
            line = whole[:where].count(b"\n") + 1
            assert report.first is not None and report.first.rule == "chain", where
            assert report.first.line == line and report.first.offset == starts(whole)[line - 1], where
            with pytest.raises(LedgerCorrupt) as caught:
                Ledger(path).append("note", Note(text="x"))
            assert caught.value.line == line
            assert path.read_bytes() == bytes(damaged), where


def test_a_good_hash_does_not_save_a_broken_chain(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = whole.splitlines(keepends=True)
    forged = [
        b"".join([*lines[:2], *lines[3:]]),  # a record taken out
        b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]),  # two swapped
        whole + lines[-1],  # one twice
        b"".join(lines[1:]),  # genesis gone
        whole + forge_after(whole, prev="0" * 64),
        whole + forge_after(whole, seq=17),
        whole + forge_after(whole, type="ledger.genesis"),
        whole + b"\n",
        whole + b"{}\n",
    ]
    for data in forged:
        path.write_bytes(data)
        with pytest.raises(LedgerCorrupt):
            Ledger(path).append("note", Note(text="x"))
        with pytest.raises(LedgerCorrupt):
            Ledger(path).head()
        assert not verify(path).ok
        assert path.read_bytes() == data


def test_readers_leave_a_torn_tail_alone(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(whole + b'{"v":1')
    reader = Ledger(path)
    assert len(list(reader.records())) == 6 and reader.torn == b'{"v":1'
    report = verify(path)
    assert report.ok and report.torn_bytes == 6
    assert [item.name for item in tmp_path.iterdir()] == ["ledger.jsonl"]
    assert path.read_bytes() == whole + b'{"v":1'
