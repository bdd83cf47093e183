"""Codecs of the export: one tensor to its stored form and back.

``int8_row`` and ``int8_tensor`` are the challenge's int8_clean_per_row_v1 (challenge_spec section 4):
values are clipped at a quantile of |w|, divided by the scale in fp32 and rounded to [-127, 127].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.export.errors import ExportError, NonFiniteTensorError
from trainer.export.policy import CodecName, codec_for, is_control

FORMAT = "int8_clean_per_row_v1"
Q_MAX = 127
SCALE_FLOOR = 1.0 / Q_MAX  # challenge_spec section 4: rows with clip < 1 all share this step size

FLOAT_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}
RAW_DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "bool": torch.bool,
}

_QUANTILE_MAX = 1 << 23  # elements sorted at once; torch.quantile refuses inputs beyond 2**24


@dataclass(frozen=True)
class Encoded:
    """One tensor as stored.

    ``dtype``: name of the dtype that decoding gives back. ``data``: int8 [*shape] for the int8
    codecs, else the passed-through tensor in its stored type. ``scale``: fp16 [rows] for
    ``int8_row``, fp32 [] for ``int8_tensor``, else None.
    """

    name: str
    codec: CodecName
    dtype: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None


def _row_clip(w: Tensor, quantile: float) -> Tensor:
    """Per-row ``quantile`` of |w|: fp32 [rows, cols] -> fp32 [rows]. In row blocks, to bound memory."""
    rows, cols = w.shape
    step = max(1, _QUANTILE_MAX // max(1, cols))
    return torch.cat([torch.quantile(w[i : i + step].abs(), quantile, dim=1) for i in range(0, rows, step)])


def _flat_clip(w: Tensor, quantile: float) -> Tensor:
    """``quantile`` of |w| over all elements, linear between neighbours: fp32 [...] -> fp32 []."""
    flat = w.abs().flatten()
    if flat.numel() <= _QUANTILE_MAX:
        return torch.quantile(flat, quantile)
    ordered = flat.sort().values
    rank = quantile * (flat.numel() - 1)
    low = int(rank)
    return torch.lerp(ordered[low], ordered[min(low + 1, flat.numel() - 1)], rank - low)


def _quantize(w: Tensor, clip: Tensor, scale: Tensor) -> Tensor:
    """int8 codes of fp32 ``w``, with ``clip`` and ``scale`` broadcast against it."""
    clipped = torch.maximum(torch.minimum(w, clip), -clip)
    return torch.clamp(torch.round(clipped / scale), -Q_MAX, Q_MAX).to(torch.int8)


def _finite(name: str, tensor: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteTensorError(f"tensor {name}: {what} non-finite values; nothing was exported")
    return tensor


def encode(
    name: str, tensor: Tensor, *, clip_quantile: float, keep_float_max_numel: int, control: bool = False
) -> Encoded:
    """Encode one state-dict entry by the policy. ``control``: treat it as a control tensor whatever its name.

    Raises ExportError for a dtype that no codec stores, NonFiniteTensorError for NaN or infinity
    in the tensor or in its stored form (an fp16 overflow).
    """
    w = tensor.detach().cpu().contiguous()
    dtype, shape = str(w.dtype).removeprefix("torch."), tuple(w.shape)
    codec = codec_for(
        ndim=w.ndim, numel=w.numel(), is_float=w.is_floating_point(), control=control or is_control(name),
        keep_float_max_numel=keep_float_max_numel,
    )
    if dtype not in (RAW_DTYPES if codec == "raw" else FLOAT_DTYPES):
        known = ", ".join([*FLOAT_DTYPES, *RAW_DTYPES])
        raise ExportError(f"tensor {name}: dtype {dtype} cannot be stored; expected one of {known}")
    if codec == "raw":
        return Encoded(name, codec, dtype, shape, w.clone())
    _finite(name, w, "holds")
    if codec == "fp16":
        w16 = w.to(torch.float16, copy=True)
        return Encoded(name, codec, dtype, shape, _finite(name, w16, "rounding to fp16 gives"))
    w32 = _finite(name, w.to(torch.float32, copy=True), "rounding to fp32 gives")
    if codec == "fp32":  # the challenge records no original dtype for these: they come back as fp32
        return Encoded(name, codec, "float32", shape, w32)
    entry = _encode_int8(name, codec, dtype, w32, clip_quantile)
    _finite(name, decode(entry), "dequantising gives")
    return entry


def _encode_int8(name: str, codec: CodecName, dtype: str, w32: Tensor, clip_quantile: float) -> Encoded:
    shape = tuple(w32.shape)
    if codec == "int8_row":
        clip = _row_clip(w32, clip_quantile)
        scale = (clip / Q_MAX).clamp_min(SCALE_FLOOR)
        q = _quantize(w32, clip[:, None], scale[:, None])
        stored = _finite(name, scale.to(torch.float16), "its fp16 scales hold")
        return Encoded(name, codec, dtype, shape, q, stored)
    clip = _flat_clip(w32, clip_quantile)
    scale = clip / Q_MAX
    if float(scale) <= 0:  # all zero (or a clip so small that the division underflows): any scale will do
        scale = torch.ones_like(clip)
    return Encoded(name, codec, dtype, shape, _quantize(w32, clip, scale), scale)


def decode(entry: Encoded) -> Tensor:
    """The tensor that ``entry`` stands for: codes times *stored* scale in fp32, then the recorded dtype."""
    dtype = {**FLOAT_DTYPES, **RAW_DTYPES}[entry.dtype]
    if entry.scale is None:
        return entry.data.to(dtype)
    scale = entry.scale.float()
    if entry.codec == "int8_row":
        scale = scale[:, None]
    return (entry.data.float() * scale).to(dtype)
