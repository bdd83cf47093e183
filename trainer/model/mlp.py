"""The feed-forward half of a block."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.model.init import Projection, constant
from trainer.model.sites import Context, Place, Plan


class ReluSquared(nn.Module):
    """``relu(x)²`` (So et al. 2021, Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, same shape."""
        return x.relu().square()


def _plain(_: Place) -> nn.Module:
    return ReluSquared()


class MLP(nn.Module):
    """``proj(act(fc(h)))``; ``act`` is the slot ``mlp_activation``."""

    def __init__(self, plan: Plan, layer: int) -> None:
        super().__init__()
        shape = plan.shape
        self.fc = Projection(shape.model_dim, shape.mlp_dim)
        self.act = plan.slot("mlp_activation", _plain, layer)
        self.proj = Projection(shape.mlp_dim, shape.model_dim, init=constant(0.0))
        self.at_mlp_out = plan.site("mlp_out", layer)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """Normalised stream [B, T, D] -> what the MLP adds to it, [B, T, D]."""
        ctx.h = h
        return self.at_mlp_out(self.proj(self.act(self.fc(h))), ctx)
