"""State dict to artifact file and back: the only doors to the export."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export import container
from trainer.export.codecs import Encoded, decode, encode
from trainer.export.compress import MAX_PAYLOAD_BYTES
from trainer.export.errors import ArtifactError
from trainer.knobs import REGISTRY, KnobError, KnobValue

STORED_ROLES = ("shape", "model", "eval")
"""Roles of the knobs that an artifact carries: what rebuilds and scores the model, not how it was trained."""


@dataclass(frozen=True)
class TensorInfo:
    """How one tensor was stored. ``stored_bytes``: before compression, scales included."""

    name: str
    codec: str
    shape: tuple[int, ...]
    stored_bytes: int


@dataclass(frozen=True)
class ExportInfo:
    """What :func:`export_model` wrote. ``payload_bytes``: tensor bytes before compression."""

    bytes: int
    sha256: str
    payload_bytes: int
    tensors: tuple[TensorInfo, ...]


def stored_knobs(knobs: Mapping[str, Any]) -> dict[str, KnobValue]:
    """The active, non-default knobs of ``knobs`` that an artifact carries."""
    active = REGISTRY.active(REGISTRY.resolve(knobs))
    return {name: value for name, value in active.items() if REGISTRY.get(name).role in STORED_ROLES}


def encode_state(
    state_dict: Mapping[str, Tensor], knobs: Mapping[str, Any], control: Collection[str] = ()
) -> list[Encoded]:
    """Encode every entry by the policy and the export knobs; what an artifact would hold.

    ``control``: names to treat as control tensors besides those that the policy knows by name (a
    technique's parameters whose export role is "control"). Raises ExportError or its
    NonFiniteTensorError, naming the tensor.
    """
    resolved = REGISTRY.resolve(knobs)
    quantile, keep = resolved["int8_clip_quantile"], resolved["keep_float_max_numel"]
    assert isinstance(quantile, float) and isinstance(keep, int)
    return [
        encode(name, tensor, clip_quantile=quantile, keep_float_max_numel=keep, control=name in control)
        for name, tensor in state_dict.items()
    ]


def export_model(
    state_dict: Mapping[str, Tensor], knobs: Mapping[str, Any], path: Path, control: Collection[str] = ()
) -> ExportInfo:
    """Quantise, compress and write ``path``, atomically and durably (a reader sees all of it or nothing).

    ``knobs``: settings by name; what is missing takes its default. ``control``: see
    :func:`encode_state`. Equal weights and knobs give
    equal bytes. Raises ExportError (NonFiniteTensorError for NaN or infinity), KnobError, OSError.
    """
    resolved = REGISTRY.resolve(knobs)
    entries = encode_state(state_dict, resolved, control)
    kind, compressor = str(resolved["container"]), str(resolved["compressor"])
    data = container.pack(entries, stored_knobs(resolved), kind, compressor)
    write_durably(path, data)
    tensors = tuple(TensorInfo(e.name, e.codec, e.shape, _stored_bytes(e)) for e in entries)
    return ExportInfo(
        bytes=len(data), sha256=hashlib.sha256(data).hexdigest(),
        payload_bytes=sum(t.stored_bytes for t in tensors), tensors=tensors,
    )


def load_artifact(
    path: Path, expect_sha256: str | None = None
) -> tuple[dict[str, KnobValue], dict[str, Tensor]]:
    """Read an artifact: ``(every knob, resolved; state dict of CPU tensors in their original dtypes)``.

    Export and training knobs, which an artifact does not carry, come back at their defaults. The
    file is read once: what is hashed is what is parsed. Raises ArtifactError naming the fault.
    """
    data = read_bounded(path)
    found = hashlib.sha256(data).hexdigest()
    if expect_sha256 is not None and found != expect_sha256:
        raise ArtifactError(f"{path}: sha256 is {found}, expected {expect_sha256}: not the exported file")
    try:
        entries, stored = container.unpack(data)
        knobs = _check_knobs(stored)
        return knobs, {e.name: _decode_finite(e) for e in entries}
    except ArtifactError as e:
        raise ArtifactError(f"{path}: {e}") from e


def _decode_finite(entry: Encoded) -> Tensor:
    tensor = decode(entry)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ArtifactError(f"tensor {entry.name}: non-finite values")
    return tensor


def _check_knobs(stored: Mapping[str, Any]) -> dict[str, KnobValue]:
    try:
        parsed = REGISTRY.parse(stored)
        resolved = REGISTRY.resolve(parsed)
    except KnobError as e:
        raise ArtifactError(f"knobs: {e}") from e
    for name, value in parsed.items():
        if name not in stored or stored[name] != value or type(stored[name]) is not type(value):
            raise ArtifactError(f"knobs: {name} = {value!r} is not written in its plain form")
        if REGISTRY.get(name).role not in STORED_ROLES:
            raise ArtifactError(f"knobs: {name} has no place in an artifact")
    return resolved


def _stored_bytes(entry: Encoded) -> int:
    parts = [entry.data] if entry.scale is None else [entry.data, entry.scale]
    return sum(p.numel() * p.element_size() for p in parts)


def read_bounded(path: Path) -> bytes:
    """The whole file, or ArtifactError when it is missing, unreadable or larger than any artifact can be."""
    try:
        with path.open("rb") as f:
            if (size := os.fstat(f.fileno()).st_size) > MAX_PAYLOAD_BYTES:
                raise ArtifactError(f"{path}: {size} bytes, over {MAX_PAYLOAD_BYTES}; that is no artifact")
            return f.read(MAX_PAYLOAD_BYTES)
    except OSError as e:
        raise ArtifactError(f"{path}: {e.strerror or e}") from e


def write_durably(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder; fsync file and folder."""
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with tmp.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
