"""Which codec stores which tensor: the rules of int8_clean_per_row_v1, in order. Torch-free."""

from __future__ import annotations

from typing import Literal

CodecName = Literal["raw", "fp32", "fp16", "int8_row", "int8_tensor"]

CONTROL_PATTERNS: tuple[str, ...] = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight")
"""A tensor whose name contains one of these (so the plural forms too) steers the residual stream."""


def is_control(name: str) -> bool:
    """Whether the parameter called ``name`` is one of the challenge's control tensors."""
    return any(pattern in name for pattern in CONTROL_PATTERNS)


def codec_for(
    *, ndim: int, numel: int, is_float: bool, control: bool, keep_float_max_numel: int
) -> CodecName:
    """The codec of one tensor (challenge_spec section 4).

    Non-float tensors pass through; up to ``keep_float_max_numel`` elements stay float (control
    tensors fp32, others fp16); larger matrices get one int8 scale per row, larger tensors of any
    other rank one scale. Parameters that a technique adds follow the same rules; ``control`` is
    :func:`is_control` of the name, or what the technique says of its parameter's export role.
    """
    if not is_float:
        return "raw"
    if numel <= keep_float_max_numel:
        return "fp32" if control else "fp16"
    return "int8_row" if ndim == 2 else "int8_tensor"
