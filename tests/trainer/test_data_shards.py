"""Shard files: the bytes on disk against struct, and every way in which a file can be broken."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.shards import ShardError, open_shard, parse_shard_name, read_header, shard_name, write_shard


def raw_shard(tokens: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """The challenge's format spelled out with struct, independent of the module under test."""
    head = struct.pack("<3i", magic, version, len(tokens) if count is None else count) + bytes(4 * 253)
    return head + struct.pack(f"<{len(tokens)}H", *tokens)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 65535), max_size=300))
def test_writes_the_format_and_reads_it_back(tokens: list[int]) -> None:
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "x_train_000000.bin"
        sha = write_shard(path, np.array(tokens, dtype=np.int64))
        assert path.read_bytes() == raw_shard(tokens)
        assert sha == hashlib.sha256(raw_shard(tokens)).hexdigest()
        assert open_shard(path).tolist() == tokens
        assert read_header(path).tokens == len(tokens)
        assert [p.name for p in Path(d).iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["truncated", "0 bytes", "1024"]),
        (raw_shard([])[:1000], ["truncated", "1000 bytes", "1024"]),
        (raw_shard([1, 2], magic=20240801), ["magic = 20240801", "20240520"]),
        (raw_shard([1, 2], version=2), ["version = 2", "expected 1"]),
        (raw_shard([1, 2], count=-1), ["count = -1", "0 or more"]),
        (raw_shard([1, 2], count=3), ["size = 1028", "1030", "truncated"]),
        (raw_shard([1, 2], count=1), ["size = 1028", "1026", "too long"]),
        (raw_shard([1, 2])[:-1], ["size = 1027", "1028", "half a token"]),
        (raw_shard([1, 2]) + b"\0", ["size = 1029", "1028", "half a token"]),
    ],
)
def test_a_broken_file_is_named_with_field_value_and_what_is_valid(
    tmp_path: Path, content: bytes, words: list[str]
) -> None:
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(content)
    for read in (read_header, open_shard):
        with pytest.raises(ShardError) as e:
            read(path)
        for word in [str(path), *words]:
            assert word in str(e.value)


def test_a_missing_file_is_a_shard_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="No such file"):
        open_shard(tmp_path / "gone.bin")


@pytest.mark.parametrize("at", [0, 4_194_303, 4_194_304, 4_200_000])
def test_an_id_outside_the_vocabulary_is_found_in_any_chunk(tmp_path: Path, at: int) -> None:
    tokens = np.full(4_200_001, 1023, dtype=np.uint16)
    tokens[at] = 1024
    path = tmp_path / "a_val_000000.bin"
    write_shard(path, tokens)
    assert len(open_shard(path, 1025)) == len(tokens)
    with pytest.raises(ShardError, match=rf"token {at} = 1024, expected an id below vocab_size = 1024"):
        open_shard(path, 1024)


@pytest.mark.parametrize("tokens", [[-1], [65536], [[1, 2]], [0.5]])
def test_what_does_not_fit_the_format_is_refused_and_leaves_nothing(tmp_path: Path, tokens: list[object]) -> None:
    with pytest.raises(ShardError):
        write_shard(tmp_path / "a_val_000000.bin", np.array(tokens))
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_shard_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a_val_000000.bin"
    write_shard(path, [1, 2, 3])
    with pytest.raises(ValueError, match="read-only"):
        open_shard(path)[0] = 9


def test_names() -> None:
    assert shard_name("fineweb", "val", 7) == "fineweb_val_000007.bin"
    assert parse_shard_name("fineweb_val_000007.bin") == ("fineweb", "val", 7)
    assert parse_shard_name("my_val_train_000000.bin") == ("my_val", "train", 0)
    for other in ("fineweb_val_bytes_000000.bin", "fineweb_val_7.bin", "fineweb_test_000000.bin",
                  "_val_000000.bin", "fineweb_val_000000.bin.tmp"):
        assert parse_shard_name(other) is None
