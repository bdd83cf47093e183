"""ema_decay: export an exponential moving average of the weights.

The average over steps 1..n is ``sum d^(n-i) w_i / sum d^(n-i)``: normalised, so the random start has no
share in it and a short run is not dragged back. The recursion ``a += α_n (w_n - a)`` with
``α_n = (1-d)/(1-d^n)`` gives exactly that (the bias correction of Adam, folded into the rate).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.model.sites import Knobs, StepView, Technique, TrainHook


class WeightAverage(TrainHook):
    """Keeps the average of every parameter, fp32, on the parameters' device."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_update(self, view: StepView) -> None:
        """Take one more set of weights into the average."""
        self.count += 1
        if not self.average:
            self.average = {name: p.detach().float().clone() for name, p in view.named.items()}
            return
        rate = (1.0 - self.decay) / (1.0 - self.decay**self.count)
        now = [view.named[name].detach() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), now, rate)  # pyright: ignore[reportPrivateImportUsage]

    def weights_end(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The averages in place of the weights; anything not averaged passes unchanged."""
        return {name: self.average.get(name, w) for name, w in weights.items()}

    def state(self) -> dict[str, Any]:
        """Step count and averages."""
        return {"count": self.count, "average": {n: t.clone() for n, t in self.average.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.count = int(state["count"])
        self.average = {name: t.clone() for name, t in state["average"].items()}


def _build(knobs: Knobs) -> TrainHook:
    return WeightAverage(float(knobs["ema_decay"]))


TECHNIQUE = Technique(name="ema_decay", train=_build)
