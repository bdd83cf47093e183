"""Artifact bytes: which container and compressor, and the checks that hold for both.

A ``flat`` artifact starts with a prelude (magic, version, compressor, uncompressed size); a
``challenge`` artifact is a bare zlib or zstd stream, as the challenge's own loader wants it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from trainer.export import challenge, flat
from trainer.export.codecs import Q_MAX, Encoded
from trainer.export.compress import MAX_PAYLOAD_BYTES, Compressor, compress, decompress
from trainer.export.errors import ArtifactError, ExportError

MAGIC = b"ARPG"
VERSION = 1
_PRELUDE = struct.Struct("<4sBBI")  # magic, version, compressor id, uncompressed size
_COMPRESSOR_ID: dict[str, int] = {"zstd": 0, "zlib": 1}
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZLIB_MAGIC = b"\x78\xda"  # deflate, 32 KiB window, level 9


def pack(entries: Sequence[Encoded], knobs: Mapping[str, Any], container: str, compressor: str) -> bytes:
    """The artifact's bytes. Equal input gives equal bytes. Raises ExportError when it cannot be stored."""
    if compressor not in _COMPRESSOR_ID or container not in ("flat", "challenge"):
        given = f"container = {container!r}, compressor = {compressor!r}"
        raise ExportError(f"{given}: expected flat or challenge, zstd or zlib")
    kind = cast(Compressor, compressor)
    if container == "challenge":
        return compress(challenge.pack(entries, knobs), kind)
    payload = flat.pack(entries, knobs)
    packed = compress(payload, kind)
    return _PRELUDE.pack(MAGIC, VERSION, _COMPRESSOR_ID[kind], len(payload)) + packed


def unpack(data: bytes) -> tuple[list[Encoded], dict[str, Any]]:
    """Parse any artifact: ``(entries, knobs as stored)``. Every fault is an ArtifactError naming it."""
    if data.startswith(MAGIC):
        entries, knobs = flat.unpack(_flat_payload(data))
    elif data.startswith(_ZLIB_MAGIC):
        entries, knobs = challenge.unpack(decompress(data, "zlib"))
    elif data.startswith(_ZSTD_MAGIC):
        entries, knobs = challenge.unpack(decompress(data, "zstd"))
    else:
        raise ArtifactError(f"bad magic {data[:4]!r}: not an artifact of this trainer")
    for entry in entries:
        _check_values(entry)
    return entries, knobs


def _flat_payload(data: bytes) -> bytes:
    if len(data) < _PRELUDE.size:
        raise ArtifactError(f"truncated: {len(data)} bytes, the prelude alone has {_PRELUDE.size}")
    _, version, compressor_id, size = _PRELUDE.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(f"version {version} of the flat container is not known; expected {VERSION}")
    names = {v: k for k, v in _COMPRESSOR_ID.items()}
    if compressor_id not in names:
        raise ArtifactError(f"compressor id {compressor_id} is not known; expected one of {sorted(names)}")
    if size > MAX_PAYLOAD_BYTES:
        raise ArtifactError(f"declared payload of {size} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    payload = decompress(data[_PRELUDE.size :], cast(Compressor, names[compressor_id]), limit=size)
    if len(payload) != size:
        raise ArtifactError(f"payload has {len(payload)} bytes, {size} were declared")
    return payload


def _check_values(entry: Encoded) -> None:
    """Quantised values that no export writes: bad scales, the code -128."""
    if entry.scale is None:
        return
    if not bool(torch.isfinite(entry.scale).all()):
        raise ArtifactError(f"tensor {entry.name}: non-finite scales")
    if not bool((entry.scale > 0).all()):
        raise ArtifactError(f"tensor {entry.name}: scales must be positive")
    if entry.data.numel() and int(entry.data.min()) < -Q_MAX:
        raise ArtifactError(f"tensor {entry.name}: code -128 is outside the int8 range used")
