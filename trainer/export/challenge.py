"""The ``challenge`` container: the official int8_clean_per_row_v1 object, torch.save'd.

The keys are the official ones (challenge_spec section 4), so the challenge's own loader reads the
file; one extra key carries the knobs that rebuild the model. Reading goes through
``torch.load(weights_only=True)``, on a zip whose entries are stored, not deflated.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.export.codecs import FLOAT_DTYPES, FORMAT, RAW_DTYPES, Encoded
from trainer.export.errors import ArtifactError

KNOBS_KEY = "autoresearch_knobs"
_PARTS = ("quantized", "scales", "dtypes", "passthrough")
_OPTIONAL = ("qmeta", "passthrough_orig_dtypes")
_KEYS = frozenset({"__quant_format__", KNOBS_KEY, *_PARTS, *_OPTIONAL})

# What torch.load(weights_only=True) was seen to raise, or may by its source, on a damaged zip or pickle.
_LOAD_ERRORS = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, EOFError,
    OverflowError, OSError, MemoryError, pickle.PickleError, zipfile.BadZipFile, NotImplementedError,
)


def pack(entries: Sequence[Encoded], knobs: Mapping[str, Any]) -> bytes:
    """The uncompressed torch.save bytes; they depend on the entries' order, so it is fixed by name."""
    obj: dict[str, Any] = {"__quant_format__": FORMAT, **{part: {} for part in _PARTS}}
    qmeta: dict[str, dict[str, Any]] = {}
    original: dict[str, str] = {}
    for e in sorted(entries, key=lambda e: e.name):
        if e.scale is not None:
            obj["quantized"][e.name] = e.data
            obj["scales"][e.name] = e.scale
            obj["dtypes"][e.name] = e.dtype
            if e.codec == "int8_row":
                qmeta[e.name] = {"scheme": "per_row", "axis": 0}
        else:
            obj["passthrough"][e.name] = e.data
            if e.codec == "fp16":
                original[e.name] = e.dtype
    if qmeta:
        obj["qmeta"] = qmeta
    if original:
        obj["passthrough_orig_dtypes"] = original
    obj[KNOBS_KEY] = dict(sorted(knobs.items()))
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def unpack(payload: bytes) -> tuple[list[Encoded], dict[str, Any]]:
    """Parse what :func:`pack` wrote: ``(entries, knobs as stored)``. Faults are ArtifactErrors."""
    _check_zip(payload)
    try:
        obj = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as e:
        first = str(e).splitlines()[0] if str(e) else ""
        raise ArtifactError(f"torch object cannot be read: {type(e).__name__}: {first}") from e
    if not isinstance(obj, dict) or not {"__quant_format__", KNOBS_KEY, *_PARTS} <= set(obj) <= _KEYS:
        keys = sorted(map(str, obj)) if isinstance(obj, dict) else type(obj).__name__
        raise ArtifactError(f"torch object: expected the keys {sorted(_KEYS)}, found {str(keys)[:200]}")
    if obj["__quant_format__"] != FORMAT:
        raise ArtifactError(f"torch object: format {str(obj['__quant_format__'])[:40]!r}; expected {FORMAT}")
    parts: dict[str, dict[str, Any]] = {}
    for part in (*_PARTS, *_OPTIONAL, KNOBS_KEY):
        value = obj.get(part, {})
        if not isinstance(value, dict) or not all(isinstance(k, str) and k for k in value):
            raise ArtifactError(f"torch object: {part} is not a mapping with text keys")
        parts[part] = dict(value)
    if not parts["quantized"].keys() == parts["scales"].keys() == parts["dtypes"].keys():
        raise ArtifactError("torch object: quantized, scales and dtypes name different tensors")
    if parts["quantized"].keys() & parts["passthrough"].keys():
        raise ArtifactError("duplicate tensor name(s): both quantized and passed through")
    if not parts["qmeta"].keys() <= parts["quantized"].keys():
        raise ArtifactError("torch object: qmeta names a tensor that is not there")
    if not parts["passthrough_orig_dtypes"].keys() <= parts["passthrough"].keys():
        raise ArtifactError("torch object: passthrough_orig_dtypes names a tensor that is not there")
    entries = [_quantized(name, parts) for name in parts["quantized"]]
    entries += [_passed(name, parts) for name in parts["passthrough"]]
    return entries, parts[KNOBS_KEY]


def _check_zip(payload: bytes) -> None:
    """Only a plain zip of stored entries: no legacy pickle, no second compression inside."""
    if not payload.startswith(b"PK\x03\x04"):
        raise ArtifactError("torch object: not a zip file")
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, IndexError) as e:
        raise ArtifactError(f"torch object: damaged zip: {e}") from e
    if any(i.compress_type != zipfile.ZIP_STORED for i in infos):
        raise ArtifactError("torch object: a zip entry is compressed; expected stored entries only")
    if sum(i.file_size for i in infos) > len(payload):
        raise ArtifactError("torch object: zip entries overlap")
    if len({i.filename for i in infos}) != len(infos):
        raise ArtifactError("torch object: duplicate zip entries")


def _tensor(name: str, value: Any, known: Callable[[torch.dtype], bool]) -> Tensor:
    """``value`` as an owned, contiguous CPU tensor of a known dtype."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        raise ArtifactError(f"tensor {name}: expected a plain dense tensor, found {type(value).__name__}")
    if not known(value.dtype):
        raise ArtifactError(f"tensor {name}: unexpected stored dtype {value.dtype}")
    if value.requires_grad or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ArtifactError(f"tensor {name}: a shape that repeats its storage, or a gradient flag")
    return value.contiguous().clone()


def _quantized(name: str, parts: Mapping[str, Mapping[str, Any]]) -> Encoded:
    per_row = name in parts["qmeta"]
    if per_row and parts["qmeta"][name] != {"scheme": "per_row", "axis": 0}:
        raise ArtifactError(f"tensor {name}: unknown quantisation scheme {str(parts['qmeta'][name])[:80]}")
    q = _tensor(name, parts["quantized"][name], lambda d: d == torch.int8)
    want = torch.float16 if per_row else torch.float32
    scale = _tensor(name, parts["scales"][name], lambda d: d == want)
    if (per_row and q.ndim != 2) or tuple(scale.shape) != (tuple(q.shape[:1]) if per_row else ()):
        raise ArtifactError(f"tensor {name}: scales {tuple(scale.shape)} do not fit codes {tuple(q.shape)}")
    dtype = parts["dtypes"][name]
    if dtype not in FLOAT_DTYPES:
        raise ArtifactError(f"tensor {name}: dtype {str(dtype)[:40]!r} is not a known float type")
    return Encoded(name, "int8_row" if per_row else "int8_tensor", dtype, tuple(q.shape), q, scale)


def _passed(name: str, parts: Mapping[str, Mapping[str, Any]]) -> Encoded:
    original = parts["passthrough_orig_dtypes"].get(name)
    value = parts["passthrough"][name]
    if original is not None:
        if original not in FLOAT_DTYPES:
            raise ArtifactError(f"tensor {name}: dtype {str(original)[:40]!r} is not a known float type")
        data = _tensor(name, value, lambda d: d == torch.float16)
        return Encoded(name, "fp16", original, tuple(data.shape), data)
    data = _tensor(name, value, lambda d: d == torch.float32 or d in RAW_DTYPES.values())
    dtype = str(data.dtype).removeprefix("torch.")
    return Encoded(name, "fp32" if data.dtype == torch.float32 else "raw", dtype, tuple(data.shape), data)
