"""RMS normalisation without a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = torch.finfo(torch.float32).eps
"""Named, not left to torch: its default depends on the input's dtype, and bf16's 0.0078 would swamp the
mean square of a fresh embedding (0.005² = 0.000025)."""


class _RmsNorm(torch.autograd.Function):
    """With y = x·r and r = 1/sqrt(mean(x²) + EPS): dx = r · (g - y · mean(g·y)).

    torch's own, on the CPU, is a chain of a dozen elementwise passes; this is half the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rate = norm.square_().mul_(1.0 / x.shape[-1]).add_(EPS).rsqrt_()
        y = x * rate
        ctx.save_for_backward(y, rate)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, rate = ctx.saved_tensors
        along = (grads[0] * y).mean(-1, keepdim=True)
        return torch.addcmul(grads[0], y, along, value=-1.0).mul_(rate)


def rms_norm(x: Tensor) -> Tensor:
    """``x / sqrt(mean(x²) + EPS)`` over the last dimension; same shape and dtype."""
    if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), eps=EPS)
    return _RmsNorm.apply(x)  # pyright: ignore[reportReturnType]
