"""smear_gate: a token's embedding takes a gated share of the one before it (SmearGate, second form).

``x_t += λ · sigmoid(w · x_t[:12]) · x_{t-1}``, except where token t opens a document: there the token
before belongs to another text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.init import ParamRole, add_param, constant
from trainer.model.sites import BOS_ID, Context, Place, Technique

WINDOW = 12
"""Leading features that the gate reads; the records' GATE_WINDOW."""


class SmearGate(nn.Module):
    """Gate ``weight`` [window] and strength ``lam`` [1], both zero at the start: begins as the identity."""

    weight: nn.Parameter
    lam: nn.Parameter

    def __init__(self, window: int) -> None:
        super().__init__()
        role = ParamRole(group="scalar", init=constant(0.0), export="control")
        add_param(self, "weight", (window,), role)
        add_param(self, "lam", (1,), role)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]; position t looks at t and t-1 only."""
        here, before = x[:, 1:], x[:, :-1]
        gate = torch.sigmoid(here[..., : self.weight.shape[0]] @ self.weight.to(x.dtype))
        share = self.lam.to(x.dtype) * gate * (ctx.ids[:, 1:] != BOS_ID)
        return torch.cat((x[:, :1], torch.addcmul(here, share[..., None], before)), dim=1)


def _build(place: Place) -> nn.Module:
    return SmearGate(min(WINDOW, place.shape.model_dim))


TECHNIQUE = Technique(name="smear_gate", hooks={"embed": _build})
