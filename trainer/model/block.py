"""One transformer block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.attention import Attention
from trainer.model.init import ParamRole, add_param, constant, first_row_one
from trainer.model.mlp import MLP
from trainer.model.norm import rms_norm
from trainer.model.sites import Context, Plan


class Block(nn.Module):
    """Mix with x0, then attention, then MLP, each added through a learned per-feature scale."""

    attn_scale: nn.Parameter
    mlp_scale: nn.Parameter
    resid_mix: nn.Parameter

    def __init__(self, plan: Plan, layer: int, q_gain_init: float) -> None:
        super().__init__()
        dim = plan.shape.model_dim
        one = ParamRole(group="scalar", init=constant(1.0), export="control")
        add_param(self, "attn_scale", (dim,), one)
        add_param(self, "mlp_scale", (dim,), one)
        add_param(self, "resid_mix", (2, dim), ParamRole(group="scalar", init=first_row_one, export="control"))
        self.at_pre_block = plan.site("pre_block", layer)
        self.attn = Attention(plan, layer, q_gain_init)
        self.mlp = MLP(plan, layer)
        self.at_residual = plan.site("residual", layer)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.at_pre_block(x, ctx)
        mix = self.resid_mix.to(x.dtype)
        x = torch.addcmul(mix[1] * ctx.x0, mix[0], x)
        x = torch.addcmul(x, self.attn_scale.to(x.dtype), self.attn(rms_norm(x), ctx))
        x = torch.addcmul(x, self.mlp_scale.to(x.dtype), self.mlp(rms_norm(x), ctx))
        return self.at_residual(x, ctx)
