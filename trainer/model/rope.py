"""Rotary position embedding (Su et al. 2021), in the half-split form."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [length, 1, head_dim/2], always fp32.

    In bf16, positions above 256 are no longer exact and the angles of a long context collapse onto each
    other. The tables are cheap, so they are made anew per forward pass: no cache to go stale.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = torch.outer(position, base ** -exponent)[:, None, :]
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x`` [B, T, H, head_dim] by its position; computed in fp32, returned in the dtype of ``x``."""
    cos, sin = tables
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1).to(x.dtype)
