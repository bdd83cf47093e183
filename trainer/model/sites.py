"""Where a technique may act on the model, and how it says so.

Two shapes only. A *hook* stands in line with others at a named site and maps a value to a value. A *slot*
holds exactly one module; a technique that fills it replaces the plain one. A technique (one file in
``trainer/techniques``) names its builders; the model asks :class:`Plan` for what is on, and never knows
any technique by name. With nothing on, sites are empty and slots hold the plain module.

Sites inside the model (B sequences of T tokens, width D, H heads of width h, vocabulary V):

==========  =======================================================================================
embed       [B, T, D]: looked-up embeddings, before the first norm
pre_block   [B, T, D]: the stream entering a block, skip already added, before the mix with x0
qkv         QKV of [B, T, H | K | K, h]: projected, before norm and rotation
attn_out    [B, T, H, h]: per-head attention output, before the output projection; ``ctx.h`` is its input
mlp_out     [B, T, D]: what the MLP adds, before its scale; ``ctx.h`` is its input
residual    [B, T, D]: the stream leaving a block
logits      [B, T, V] fp32, after the soft cap
loss        scalar fp32, nats/token; ``ctx.logits`` and ``ctx.targets`` are set
==========  =======================================================================================

Sites around the optimizer step (``grads``, ``before_update``, ``after_update``, ``weights_end``) are the
methods of :class:`TrainHook`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.knobs import REGISTRY, KnobValue
from trainer.model.init import OptimGroup

Knobs = Mapping[str, KnobValue]
Site = Literal["embed", "pre_block", "qkv", "attn_out", "mlp_out", "residual", "logits", "loss"]
Slot = Literal["mlp_activation"]

BOS_ID = 1
"""Token that opens a document; the same in every tokenizer of the challenge."""


class QKV(NamedTuple):
    """Queries [B, T, H, h], keys and values [B, T, K, h]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class Context:
    """What a hook may know besides the value it maps. One per forward pass; ``layer`` moves with it.

    ``shared`` carries tensors from one layer's hook to another's; keys begin with the technique's name.
    """

    ids: Tensor  # [B, T] int64
    targets: Tensor | None  # [B, T] int64; None when only logits are wanted
    x0: Tensor  # [B, T, D], the normalised embedding (at site embed: not yet set, equal to the value)
    rope: tuple[Tensor, Tensor]
    num_layers: int
    layer: int = 0
    h: Tensor | None = None
    logits: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The model's sizes, read once from the knobs."""

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    rope_base: float
    softcap: float
    tied: bool

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.model_dim // self.num_heads

    @classmethod
    def from_knobs(cls, knobs: Knobs) -> ModelShape:
        """Read the sizes from resolved knobs."""
        dim = int(knobs["model_dim"])
        return cls(
            vocab_size=int(knobs["vocab_size"]), num_layers=int(knobs["num_layers"]), model_dim=dim,
            num_heads=int(knobs["num_heads"]), num_kv_heads=int(knobs["num_kv_heads"]),
            mlp_dim=dim * int(knobs["mlp_mult"]), rope_base=float(knobs["rope_base"]),
            softcap=float(knobs["logit_softcap"]), tied=bool(knobs["tie_embeddings"]),
        )


class Place(NamedTuple):
    """Where a module is being built: the model's sizes, every knob, and the layer (None outside blocks)."""

    shape: ModelShape
    knobs: Knobs
    layer: int | None


Builder = Callable[[Place], nn.Module | None]
"""Builds the module for one place, or None to leave that place alone (layer selection)."""


class HookSite(nn.ModuleDict):
    """The hooks of one site of one owner, by technique name, applied in registry order."""

    def forward(self, value: Any, ctx: Context) -> Any:
        """Map ``value`` through every hook; with none, return it as it came."""
        for hook in self.values():
            value = hook(value, ctx)
        return value


@dataclass(frozen=True)
class StepView:
    """What a training hook sees at one optimizer step. Groups hold live parameters."""

    step: int  # 0-based
    fraction: float  # of the run, at the start of the step
    lr: Mapping[OptimGroup, float]  # learning rate of each group, schedule applied
    groups: Mapping[OptimGroup, Sequence[nn.Parameter]]
    named: Mapping[str, nn.Parameter]


class TrainHook:
    """Acts around the optimizer step. Every method does nothing unless overridden."""

    def grads(self, view: StepView) -> None:
        """After the backward pass, before clipping; may change ``.grad`` in place."""

    def before_update(self, view: StepView) -> None:
        """After clipping, before the optimizers move the weights (weight decay acts here)."""

    def after_update(self, view: StepView) -> None:
        """After the optimizers have moved the weights (averages look here)."""

    def weights_end(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Map the final weights to those that are exported."""
        return weights

    def state(self) -> dict[str, Any]:
        """What must be kept to continue a run exactly."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One switchable idea. ``name`` is its knob; it is on when the knob differs from its default."""

    name: str
    hooks: Mapping[Site, Builder] = field(default_factory=dict)
    slots: Mapping[Slot, Callable[[Place], nn.Module]] = field(default_factory=dict)
    train: Callable[[Knobs], TrainHook] | None = None

    def is_on(self, knobs: Knobs) -> bool:
        """Whether the knobs switch it on."""
        return knobs[self.name] != REGISTRY.get(self.name).default and REGISTRY.is_active(self.name, knobs)


class Plan:
    """The techniques that are on, as the model's builder asks for them."""

    def __init__(self, techniques: Sequence[Technique], knobs: Knobs, shape: ModelShape) -> None:
        self.shape = shape
        self._knobs = knobs
        self._on = [t for t in techniques if t.is_on(knobs)]

    def site(self, site: Site, layer: int | None = None) -> HookSite:
        """The hooks of ``site`` (of block ``layer``), keyed by technique."""
        place = Place(self.shape, self._knobs, layer)
        built = {t.name: t.hooks[site](place) for t in self._on if site in t.hooks}
        return HookSite({name: module for name, module in built.items() if module is not None})

    def slot(self, slot: Slot, plain: Callable[[Place], nn.Module], layer: int | None = None) -> nn.Module:
        """The one module of ``slot``: ``plain`` unless a technique fills it. ValueError if two do."""
        fillers = [t for t in self._on if slot in t.slots]
        if len(fillers) > 1:
            names = " and ".join(t.name for t in fillers)
            raise ValueError(f"{names}: both fill the slot {slot!r}, which holds one module; switch one of them off")
        build = fillers[0].slots[slot] if fillers else plain
        return build(Place(self.shape, self._knobs, layer))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of activations: bf16 on CUDA; elsewhere that of the weights (fp32, or fp64 in a check)."""
    return torch.bfloat16 if weight.is_cuda else weight.dtype
