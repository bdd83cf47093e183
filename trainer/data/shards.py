"""Token shards in the challenge's file format (challenge_spec, section 1).

A shard is a header of 256 little-endian int32 (1,024 bytes: magic 20240520, version 1, token count, then
zeros) followed by ``count`` little-endian uint16 token ids; the file is exactly ``1024 + 2 * count`` bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.data.errors import DataError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # the count is a signed int32
SPLITS = ("train", "dev", "val", "holdout")

_CHECK_TOKENS = 1 << 22  # ids looked at per step: 8 MiB, so that a check never holds a whole shard
# Anchored on purpose: "fineweb_val_bytes_000000.bin" (per-token byte counts, same header) is not a val shard.
_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|dev|val|holdout)_(?P<index>\d{6})\.bin")


class ShardError(DataError):
    """A file that is not a token shard; the message names file, field, value and what is valid."""


@dataclass(frozen=True)
class ShardHeader:
    """What the first 1,024 bytes say. ``tokens`` is the number of uint16 ids that follow."""

    magic: int
    version: int
    tokens: int


def shard_name(name: str, split: str, index: int) -> str:
    """File name of shard ``index`` of a split, e.g. ``fineweb_train_000000.bin``."""
    return f"{name}_{split}_{index:06d}.bin"


def parse_shard_name(filename: str) -> tuple[str, str, int] | None:
    """(name, split, index) of a shard's file name, or None for any other file."""
    m = _NAME.fullmatch(filename)
    return (m["name"], m["split"], int(m["index"])) if m else None


def write_shard(path: Path, tokens: npt.ArrayLike) -> str:
    """Write ``tokens`` (1-D, integers in [0, 65535]) atomically and durably; return the file's SHA-256.

    Raises ShardError when an id does not fit 16 bits or the array is not one-dimensional.
    """
    arr = np.asarray(tokens)
    if arr.ndim != 1 or (arr.size and arr.dtype.kind not in "iu"):
        raise ShardError(f"{path}: tokens of shape {arr.shape}, dtype {arr.dtype}: expected 1-D integers")
    if arr.size > MAX_TOKENS:
        raise ShardError(f"{path}: {arr.size} tokens: a shard holds at most {MAX_TOKENS}; write several")
    if arr.size and arr.dtype != np.uint16 and (int(arr.min()) < 0 or int(arr.max()) > 0xFFFF):
        raise ShardError(f"{path}: token id {int(arr.max() if arr.max() > 0xFFFF else arr.min())}: "
                         "an id must be in [0, 65535]")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = (MAGIC, VERSION, arr.size)
    payload = np.ascontiguousarray(arr, dtype="<u2").data.cast("B") if arr.size else b""
    digest = hashlib.sha256(header.tobytes())
    digest.update(payload)
    tmp = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with tmp.open("wb") as f:
            f.write(header.tobytes())
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    return digest.hexdigest()


def read_header(path: Path) -> ShardHeader:
    """Read and check a shard's header and file size.

    Raises ShardError for: unreadable file, fewer than 1,024 bytes, wrong magic or version, a negative
    count, an odd number of payload bytes, or a size that differs from ``1024 + 2 * count``.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(HEADER_BYTES)
            size = os.fstat(f.fileno()).st_size
    except OSError as e:
        raise ShardError(f"{path}: cannot be read ({e.strerror or e})") from e
    if len(raw) < HEADER_BYTES:
        raise ShardError(f"{path}: header is truncated: {len(raw)} bytes, a shard starts with {HEADER_BYTES}")
    magic, version, count = (int(v) for v in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ShardError(f"{path}: magic = {magic}, expected {MAGIC}: this is not a token shard")
    if version != VERSION:
        raise ShardError(f"{path}: version = {version}, expected {VERSION}")
    if count < 0:
        raise ShardError(f"{path}: token count = {count}, expected 0 or more")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        how = "truncated" if size < expected else "too long"
        odd = " (and an odd number: half a token)" if size % 2 else ""
        raise ShardError(f"{path}: size = {size} bytes{odd}, expected {expected} for token count = {count}: "
                         f"the file is {how}; fetch or build it again")
    return ShardHeader(magic, version, count)


def open_shard(path: Path, vocab_size: int | None = None) -> npt.NDArray[np.uint16]:
    """Map a shard read-only: 1-D uint16, little-endian, ``count`` long.

    With ``vocab_size``, every id is checked to be below it (in steps of 8 MiB). Raises ShardError.
    """
    count = read_header(path).tokens
    if count == 0:
        return np.zeros(0, dtype="<u2")  # an empty region cannot be mapped
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        for start in range(0, count, _CHECK_TOKENS):
            part = tokens[start : start + _CHECK_TOKENS]
            if int(part.max()) >= vocab_size:
                at = start + int(np.argmax(part >= vocab_size))
                raise ShardError(f"{path}: token {at} = {int(tokens[at])}, expected an id below "
                                 f"vocab_size = {vocab_size}: were these shards made with another tokenizer?")
    return tokens
