"""The two compressors, at fixed settings, and bounded decompression. Torch-free.

Both are single-threaded and write no time stamp, so equal input gives equal bytes (for one version
of the library).
"""

from __future__ import annotations

import zlib
from typing import Literal

import zstandard

from trainer.export.errors import ArtifactError, ExportError

Compressor = Literal["zstd", "zlib"]

MAX_PAYLOAD_BYTES = 1 << 28
"""Largest uncompressed payload, 256 MiB: sixteen times the challenge's whole budget, and small enough
that a hostile artifact cannot exhaust the machine."""

_ZLIB_LEVEL = 9  # the challenge's
_ZSTD_LEVEL = 22


def compress(payload: bytes, compressor: Compressor) -> bytes:
    """Compress at the fixed level. Raises ExportError for a payload over :data:`MAX_PAYLOAD_BYTES`."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ExportError(
            f"the uncompressed artifact is {len(payload)} bytes, over the limit of {MAX_PAYLOAD_BYTES}: "
            "use a smaller model"
        )
    if compressor == "zlib":
        return zlib.compress(payload, _ZLIB_LEVEL)
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(payload)


def decompress(data: bytes, compressor: Compressor, limit: int = MAX_PAYLOAD_BYTES) -> bytes:
    """Undo :func:`compress`.

    Raises ArtifactError when ``data`` is not exactly one complete stream, or when it would unpack
    to more than ``limit`` bytes (found out before that much memory is taken).
    """
    return _unzlib(data, limit) if compressor == "zlib" else _unzstd(data, limit)


def _unzlib(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, limit + 1)
    except zlib.error as e:
        raise ArtifactError(f"zlib stream is damaged: {e}") from e
    if len(out) > limit:
        raise ArtifactError(f"zlib stream unpacks to more than {limit} bytes")
    if not stream.eof:
        raise ArtifactError("zlib stream is truncated")
    if stream.unused_data:
        raise ArtifactError(f"{len(stream.unused_data)} trailing byte(s) after the zlib stream")
    return out


def _unzstd(data: bytes, limit: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as e:
        raise ArtifactError(f"zstd stream is damaged: {e}") from e
    if frame.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise ArtifactError("zstd stream does not declare its size")
    if frame.content_size > limit:
        raise ArtifactError(f"zstd stream declares {frame.content_size} bytes, more than {limit}")
    if frame.content_size == 0:  # decompress() would not look at the rest of an empty frame
        raise ArtifactError("zstd stream is empty")
    try:
        out = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise ArtifactError(f"zstd stream is damaged, truncated or followed by other bytes: {e}") from e
    if len(out) != frame.content_size:
        raise ArtifactError(f"zstd stream holds {len(out)} bytes, declares {frame.content_size}")
    return out
