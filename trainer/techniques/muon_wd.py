"""muon_wd: decoupled weight decay of the Muon matrices, ``p *= 1 - lr · wd`` before their update."""

from __future__ import annotations

import torch

from trainer.model.sites import Knobs, StepView, Technique, TrainHook


class MuonDecay(TrainHook):
    """Shrinks group ``matrix`` by the scheduled learning rate times ``wd``."""

    def __init__(self, wd: float) -> None:
        self.wd = wd

    @torch.no_grad()
    def before_update(self, view: StepView) -> None:
        """Scale the matrices in place."""
        if view.groups["matrix"]:
            factor = 1.0 - view.lr["matrix"] * self.wd
            torch._foreach_mul_(list(view.groups["matrix"]), factor)  # pyright: ignore[reportPrivateImportUsage]


def _build(knobs: Knobs) -> TrainHook:
    return MuonDecay(float(knobs["muon_wd"]))


TECHNIQUE = Technique(name="muon_wd", train=_build)
