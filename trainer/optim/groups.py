"""Which parameter is trained by what: Muon for the block matrices, Adam for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from trainer.model.init import OptimGroup, iter_roles
from trainer.model.sites import Knobs
from trainer.optim.adam import Adam
from trainer.optim.muon import Muon

ADAM_GROUPS: tuple[OptimGroup, ...] = ("embed", "head", "scalar")


def parameter_groups(model: nn.Module) -> dict[OptimGroup, list[nn.Parameter]]:
    """The model's parameters by role, in state-dict order; every group is present, maybe empty."""
    groups: dict[OptimGroup, list[nn.Parameter]] = {"matrix": [], **{name: [] for name in ADAM_GROUPS}}
    for _, param, role in iter_roles(model):
        groups[role.group].append(param)
    return groups


def base_rates(knobs: Knobs) -> dict[OptimGroup, float]:
    """Learning rate of each group before the schedule."""
    embed = "tied_embed_lr" if knobs["tie_embeddings"] else "embed_lr"
    return {
        "matrix": float(knobs["matrix_lr"]), "embed": float(knobs[embed]),
        "head": float(knobs["head_lr"]), "scalar": float(knobs["scalar_lr"]),
    }


class Optimizers:
    """All optimizers of a model as one thing."""

    def __init__(self, model: nn.Module, knobs: Knobs) -> None:
        self.groups = parameter_groups(model)
        self.base_rates = base_rates(knobs)
        self.params = [p for group in self.groups.values() for p in group]
        self.muon = Muon(self.groups["matrix"], int(knobs["muon_backend_steps"]))
        self.adam = Adam(
            [self.groups[name] for name in ADAM_GROUPS],
            float(knobs["beta1"]), float(knobs["beta2"]), float(knobs["adam_eps"]),
        )

    def rates(self, lr_scale: float) -> dict[OptimGroup, float]:
        """Learning rate of each group under the schedule's multiplier."""
        return {name: rate * lr_scale for name, rate in self.base_rates.items()}

    def step(self, rates: Mapping[OptimGroup, float], momentum: float) -> None:
        """Move every parameter once."""
        self.muon.step(rates["matrix"], momentum)
        self.adam.step([rates[name] for name in ADAM_GROUPS])

    def zero_grad(self) -> None:
        """Drop all gradients (memory is given back, nothing is written)."""
        for p in self.params:
            p.grad = None

    def state(self) -> dict[str, Any]:
        """All optimizer state, for a checkpoint."""
        return {"muon": self.muon.state(), "adam": self.adam.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave for the same model."""
        self.muon.load_state(state["muon"])
        self.adam.load_state(state["adam"])

    def reset(self) -> None:
        """As freshly built."""
        self.muon.reset()
        self.adam.reset()
