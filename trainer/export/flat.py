"""The ``flat`` container: a small header, then the tensors' bytes sorted by element type.

Uncompressed payload::

    u32 LE   header length in bytes
    header   canonical JSON: {"format":..., "knobs":{...}, "tensors":[[name, codec, dtype, shape], ...]}
    sections one per element type, in the order of _SECTIONS; each holds, tensor by tensor in header
             order, that type's arrays (data before scale), little-endian, as byte planes

Byte planes: the first bytes of all elements, then the second bytes, and so on: the exponents of
floats lie together and compress. No offset is stored. Where every array lies follows from the
header alone, and the arrays must fill the payload exactly, so that gaps, overlaps and hidden bytes
cannot be expressed. Nothing in here is code: no pickle, no eval.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trainer.export.codecs import FLOAT_DTYPES, FORMAT, RAW_DTYPES, Encoded
from trainer.export.errors import ArtifactError, ExportError
from trainer.export.policy import CodecName

MAX_HEADER_BYTES = 1 << 22
MAX_TENSORS = 1 << 14
MAX_NAME_CHARS = 256
MAX_DIMS = 8
_LENGTH = struct.Struct("<I")
_NUMBER = re.compile("[0-9]{1,9}")

# Order of the sections; "bool" travels as uint8 0/1.
_SECTIONS: tuple[str, ...] = ("int8", "float16", "float32", "uint8", "int16", "int32", "int64", "bool")
_NUMPY = {name: np.dtype("u1" if name == "bool" else name).newbyteorder("<") for name in _SECTIONS}


def _array_types(codec: CodecName, dtype: str) -> tuple[str, str | None]:
    """Element types of ``data`` and ``scale`` for a codec (``dtype`` matters to ``raw`` only)."""
    table: dict[str, tuple[str, str | None]] = {
        "int8_row": ("int8", "float16"), "int8_tensor": ("int8", "float32"), "fp16": ("float16", None),
        "fp32": ("float32", None), "raw": (dtype, None),
    }
    return table[codec]


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode()


def _role_key(entry: Encoded) -> tuple[str, tuple[int, ...], str]:
    """Sort key that puts the same weight of successive blocks side by side; total over names."""
    return _NUMBER.sub("#", entry.name), tuple(int(n) for n in _NUMBER.findall(entry.name)), entry.name


def pack(entries: Sequence[Encoded], knobs: Mapping[str, Any]) -> bytes:
    """The uncompressed payload. Equal entries, in whatever order, give equal bytes."""
    ordered = sorted(entries, key=_role_key)
    header = _canonical({
        "format": FORMAT, "knobs": dict(knobs),
        "tensors": [[e.name, e.codec, e.dtype, list(e.shape)] for e in ordered],
    })
    long = [e.name for e in ordered if not 0 < len(e.name) <= MAX_NAME_CHARS or len(e.shape) > MAX_DIMS]
    if long or len(ordered) > MAX_TENSORS or len(header) > MAX_HEADER_BYTES:
        raise ExportError(
            f"{len(ordered)} tensors, header of {len(header)} bytes, unstorable names or ranks {long[:3]}: "
            f"expected at most {MAX_TENSORS} tensors, {MAX_HEADER_BYTES} bytes, {MAX_NAME_CHARS} characters, "
            f"{MAX_DIMS} dimensions"
        )
    sections: dict[str, list[bytes]] = {name: [] for name in _SECTIONS}
    for e in ordered:
        for kind, tensor in zip(_array_types(e.codec, e.dtype), (e.data, e.scale), strict=True):
            if kind is not None and tensor is not None:
                sections[kind].append(_to_bytes(tensor, kind))
    body = b"".join(_to_planes(b"".join(parts), _NUMPY[kind].itemsize) for kind, parts in sections.items())
    return _LENGTH.pack(len(header)) + header + body


def _to_bytes(tensor: Tensor, kind: str) -> bytes:
    return tensor.contiguous().numpy().astype(_NUMPY[kind], copy=False).tobytes()


def _to_planes(data: bytes, itemsize: int) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(-1, itemsize).T.tobytes()


def _from_planes(data: memoryview, itemsize: int) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(itemsize, -1).T.tobytes()


def unpack(payload: bytes) -> tuple[list[Encoded], dict[str, Any]]:
    """Parse what :func:`pack` wrote: ``(entries, knobs as stored)``.

    Raises ArtifactError naming the fault: truncation, a header that is not canonical JSON of the
    expected shape, duplicate names, absurd shapes, or array sizes that do not fill the payload.
    Values (finite, scales positive) are checked by the caller, alike for every container.
    """
    header, body = _split(payload)
    tensors = [_tensor_row(row) for row in header["tensors"]]
    names = [name for name, *_ in tensors]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ArtifactError(f"duplicate tensor name(s): {', '.join(twice[:3])}")
    arrays = _read_sections(tensors, body)
    entries = []
    for name, codec, dtype, shape in tensors:
        data_kind, scale_kind = _array_types(codec, dtype)
        data = next(arrays[data_kind])
        scale = next(arrays[scale_kind]) if scale_kind else None
        entries.append(Encoded(name, codec, dtype, shape, data, scale))
    return entries, header["knobs"]


def _split(payload: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header (checked for its outer form) and the bytes behind it."""
    if len(payload) < _LENGTH.size:
        raise ArtifactError(f"payload of {len(payload)} bytes is truncated: no header length")
    (size,) = _LENGTH.unpack_from(payload)
    if size > MAX_HEADER_BYTES:
        raise ArtifactError(f"header length {size} is over the limit of {MAX_HEADER_BYTES}")
    raw = payload[_LENGTH.size : _LENGTH.size + size]
    if len(raw) != size:
        raise ArtifactError(f"payload is truncated inside the header ({len(raw)} of {size} bytes)")
    try:
        header = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        canonical = _canonical(header)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"header is not JSON: {type(e).__name__}: {e}") from e
    if canonical != raw:
        raise ArtifactError("header is not in canonical form (hidden white space, repeated or unsorted keys)")
    if not isinstance(header, dict) or set(header) != {"format", "knobs", "tensors"}:
        raise ArtifactError("header: expected an object with exactly the keys format, knobs, tensors")
    if header["format"] != FORMAT:
        raise ArtifactError(f"header: format {header['format']!r} is not known; expected {FORMAT}")
    if not isinstance(header["knobs"], dict) or not isinstance(header["tensors"], list):
        raise ArtifactError("header: knobs must be an object and tensors a list")
    if len(header["tensors"]) > MAX_TENSORS:
        raise ArtifactError(f"header: {len(header['tensors'])} tensors, over the limit of {MAX_TENSORS}")
    return header, memoryview(payload)[_LENGTH.size + size :]


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not allowed")


def _tensor_row(row: Any) -> tuple[str, CodecName, str, tuple[int, ...]]:
    """Check one ``[name, codec, dtype, shape]`` of the header."""
    if not isinstance(row, list) or len(row) != 4 or not all(isinstance(v, str) for v in row[:3]):
        raise ArtifactError(f"header: tensor row {str(row)[:80]} is not [name, codec, dtype, shape]")
    name, codec, dtype, shape = row
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise ArtifactError(f"tensor name of {len(name)} characters; expected 1 to {MAX_NAME_CHARS}")
    if codec not in ("raw", "fp32", "fp16", "int8_row", "int8_tensor"):
        raise ArtifactError(f"tensor {name}: unknown codec {codec!r}")
    allowed = {"raw": tuple(RAW_DTYPES), "fp32": ("float32",)}.get(codec, tuple(FLOAT_DTYPES))
    if dtype not in allowed:
        raise ArtifactError(f"tensor {name}: dtype {dtype!r} does not go with codec {codec}")
    if (
        not isinstance(shape, list) or len(shape) > MAX_DIMS
        or not all(type(d) is int and 0 <= d < 2**31 for d in shape)
        or (codec == "int8_row" and len(shape) != 2)
    ):
        raise ArtifactError(f"tensor {name}: absurd shape {str(shape)[:80]} for codec {codec}")
    return name, cast(CodecName, codec), dtype, tuple(shape)


def _read_sections(
    tensors: Sequence[tuple[str, CodecName, str, tuple[int, ...]]], body: memoryview
) -> dict[str, Iterator[Tensor]]:
    """Cut ``body`` into the arrays that the header announces, per element type, in header order."""
    wanted: dict[str, list[tuple[int, ...]]] = {name: [] for name in _SECTIONS}
    for _, codec, dtype, shape in tensors:
        data_kind, scale_kind = _array_types(codec, dtype)
        wanted[data_kind].append(shape)
        if scale_kind:
            wanted[scale_kind].append(shape[:1] if codec == "int8_row" else ())
    sizes = {k: sum(math.prod(s) for s in shapes) * _NUMPY[k].itemsize for k, shapes in wanted.items()}
    total = sum(sizes.values())
    if total != len(body):
        fault = "truncated" if total > len(body) else "followed by hidden bytes"
        raise ArtifactError(f"tensor data is {fault}: {len(body)} bytes, the header announces {total}")
    out: dict[str, Iterator[Tensor]] = {}
    start = 0
    for kind, shapes in wanted.items():
        part = body[start : start + sizes[kind]]
        flat = np.frombuffer(_from_planes(part, _NUMPY[kind].itemsize), _NUMPY[kind])
        start += sizes[kind]
        if kind == "bool" and flat.size and int(flat.max()) > 1:
            raise ArtifactError("a bool tensor holds a value other than 0 and 1")
        out[kind] = iter(_cut(flat, kind, shapes))
    return out


def _cut(flat: np.ndarray, kind: str, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    native = flat.astype(np.dtype(kind))  # a writable copy in the machine's own byte order
    out, start = [], 0
    for shape in shapes:
        count = math.prod(shape)
        out.append(torch.from_numpy(native[start : start + count].copy()).reshape(shape))
        start += count
    return out
