"""resid_norm: one more weightless RMSNorm on the stream before every block."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.model.norm import rms_norm
from trainer.model.sites import Context, Place, Technique


class ResidNorm(nn.Module):
    """Normalises the stream; no parameters."""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """[B, T, D] -> [B, T, D] of unit mean square."""
        return rms_norm(x)


def _build(_: Place) -> nn.Module:
    return ResidNorm()


TECHNIQUE = Technique(name="resid_norm", hooks={"pre_block": _build})
