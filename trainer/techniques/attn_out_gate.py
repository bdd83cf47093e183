"""attn_out_gate: every head's output is scaled by a gate that reads the block's input.

``y_h *= 2 · sigmoid(W_h · h[:12])`` with W zero at the start, where the factor is exactly 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.init import ParamRole, add_param, constant
from trainer.model.sites import Context, Place, Technique

WINDOW = 12
"""Leading features that the gate reads; the records' GATE_WINDOW."""


class AttnOutGate(nn.Module):
    """Gate ``weight`` [heads, window]."""

    weight: nn.Parameter

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        # A gate is a control tensor, trained by Adam: orthogonalising so thin a matrix has no meaning.
        role = ParamRole(group="scalar", init=constant(0.0), export="control")
        add_param(self, "weight", (heads, window), role)

    def forward(self, y: Tensor, ctx: Context) -> Tensor:
        """[B, T, H, h] -> [B, T, H, h]."""
        assert ctx.h is not None, "site attn_out sets ctx.h"
        gate = 2.0 * torch.sigmoid(ctx.h[..., : self.weight.shape[1]] @ self.weight.to(y.dtype).T)
        return y * gate[..., None]


def _build(place: Place) -> nn.Module:
    return AttnOutGate(place.shape.num_heads, min(WINDOW, place.shape.model_dim))


TECHNIQUE = Technique(name="attn_out_gate", hooks={"attn_out": _build})
