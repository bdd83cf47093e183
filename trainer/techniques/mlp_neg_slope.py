"""mlp_neg_slope: square of a leaky ReLU in the MLP, so that negative inputs keep a gradient."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.sites import Place, Technique


class LeakyReluSquared(nn.Module):
    """``leaky_relu(x, slope)²``."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, same shape."""
        return F.leaky_relu(x, self.slope).square()


def _build(place: Place) -> nn.Module:
    return LeakyReluSquared(float(place.knobs["mlp_neg_slope"]))


TECHNIQUE = Technique(name="mlp_neg_slope", slots={"mlp_activation": _build})
