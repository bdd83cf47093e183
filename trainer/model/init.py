"""Parameters: what each one is for, and the value it starts from.

Every parameter is drawn from a generator of its own, seeded by SHA-256 of (run seed, parameter name).
Hence switching a technique on, or reordering modules, changes the start of no other parameter, and two
configurations that share a seed differ only in what they mean to differ in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

OptimGroup = Literal["matrix", "embed", "head", "scalar"]
ExportRole = Literal["weight", "control"]
Init = Callable[[Tensor, torch.Generator], object]
"""Fills an fp32 CPU tensor in place."""

_ROLES = "_param_roles"


@dataclass(frozen=True, kw_only=True)
class ParamRole:
    """What a parameter is for.

    ``group``: the optimizer it belongs to (matrix = Muon, the others = Adam with their own learning rate).
    ``init``: its start. ``export``: ``control`` tensors stay fp32 in the artifact, ``weight`` may be
    quantised or stored as fp16.
    """

    group: OptimGroup
    init: Init
    export: ExportRole = "weight"


def param_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on ``(seed, name)`` alone: the first 8 bytes of SHA-256("seed:name")."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little"))
    return generator


def constant(value: float) -> Init:
    """Every element ``value``."""
    return lambda tensor, _: tensor.fill_(value)


def normal(std: float) -> Init:
    """N(0, std²)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def uniform_fan_in(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """U(±1/sqrt(fan_in)) for a weight [fan_out, fan_in]: what ``torch.nn.Linear`` draws by default."""
    bound = 1.0 / math.sqrt(tensor.shape[-1])
    return tensor.uniform_(-bound, bound, generator=generator)


def first_row_one(tensor: Tensor, _: torch.Generator) -> Tensor:
    """Ones in row 0, zeros elsewhere: a mix that starts as its first ingredient."""
    tensor.zero_()
    tensor[0] = 1.0
    return tensor


def add_param(module: nn.Module, name: str, shape: tuple[int, ...], role: ParamRole) -> nn.Parameter:
    """Register an fp32 parameter (uninitialised) together with its role, and return it."""
    param = nn.Parameter(torch.empty(shape, dtype=torch.float32))
    module.register_parameter(name, param)
    module.__dict__.setdefault(_ROLES, {})[name] = role
    return param


def iter_roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamRole]]:
    """Yield (full name, parameter, role) in state-dict order.

    Raises RuntimeError for a parameter that was not made by :func:`add_param`: nobody would train it.
    """
    for prefix, module in model.named_modules():
        roles: dict[str, ParamRole] = module.__dict__.get(_ROLES, {})
        for name, param in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name not in roles:
                raise RuntimeError(f"parameter {full} has no role: create it with trainer.model.init.add_param")
            yield full, param, roles[name]


@torch.no_grad()
def init_params(model: nn.Module, seed: int) -> None:
    """Fill every parameter of ``model`` by its role. Drawn on the CPU in fp32, so every device starts alike."""
    for name, param, role in iter_roles(model):
        start = torch.empty(param.shape, dtype=torch.float32, device="cpu")
        role.init(start, param_generator(seed, name))
        param.copy_(start)


class Projection(nn.Module):
    """A bias-free linear map. The fp32 weight [fan_out, fan_in] is cast to the dtype of what it multiplies."""

    weight: nn.Parameter

    def __init__(self, fan_in: int, fan_out: int, init: Init = uniform_fan_in, group: OptimGroup = "matrix"):
        super().__init__()
        add_param(self, "weight", (fan_out, fan_in), ParamRole(group=group, init=init))

    def forward(self, x: Tensor) -> Tensor:
        """[..., fan_in] -> [..., fan_out], dtype of ``x``."""
        return nn.functional.linear(x, self.weight.to(x.dtype))
