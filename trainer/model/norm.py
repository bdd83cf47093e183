"""RMS normalisation without a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = torch.finfo(torch.float32).eps
"""Named, not left to torch: its default depends on the input's dtype, and bf16's 0.0078 would swamp the
mean square of a fresh embedding (0.005² = 0.000025)."""


def rms_norm(x: Tensor) -> Tensor:
    """``x / sqrt(mean(x²) + EPS)`` over the last dimension; same shape and dtype."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)
