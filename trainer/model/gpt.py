"""The plain model: the challenge's U-Net-skipped GPT (challenge_spec, section 3), with hook sites.

Dtypes. Parameters are fp32 everywhere, the embedding too (the challenge keeps that one in bf16: its small
late updates are rounded away there). Activations are fp32 on the CPU and bf16 on CUDA; weights are cast to
the activations' dtype where they are used. Rotary tables, logits and loss are fp32.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.knobs import REGISTRY
from trainer.model.block import Block
from trainer.model.head import capped_logits, cross_entropy, head_loss
from trainer.model.init import ParamRole, Projection, add_param, constant, init_params, iter_roles, normal
from trainer.model.norm import rms_norm
from trainer.model.rope import rope_tables
from trainer.model.sites import Context, Knobs, ModelShape, Plan, compute_dtype
from trainer.techniques import TECHNIQUES


class Embedding(nn.Module):
    """The token table, ``weight`` [V, D]."""

    weight: nn.Parameter

    def __init__(self, shape: ModelShape, init_std: float) -> None:
        super().__init__()
        role = ParamRole(group="embed", init=normal(init_std))
        add_param(self, "weight", (shape.vocab_size, shape.model_dim), role)


class GPT(nn.Module):
    """Language model over token ids. Built by :func:`build_model`, started by :meth:`init_weights`."""

    skip_weights: nn.Parameter  # [L // 2, D]; absent in a model of one block

    def __init__(self, knobs: Knobs) -> None:
        super().__init__()
        shape = ModelShape.from_knobs(knobs)
        plan = Plan(TECHNIQUES, knobs, shape)
        self.shape = shape
        # An untied embedding keeps torch's default of 1, as in the published script; its rate of 0.6 goes with it.
        self.tok_emb = Embedding(shape, float(knobs["tied_embed_init_std"]) if shape.tied else 1.0)
        self.at_embed = plan.site("embed")
        self.num_encoder = shape.num_layers // 2
        if self.num_encoder:
            role = ParamRole(group="scalar", init=constant(1.0), export="control")
            add_param(self, "skip_weights", (self.num_encoder, shape.model_dim), role)
        gain = float(knobs["qk_gain_init"])
        self.blocks = nn.ModuleList(Block(plan, layer, gain) for layer in range(shape.num_layers))
        self.lm_head = None
        if not shape.tied:
            self.lm_head = Projection(shape.model_dim, shape.vocab_size, init=constant(0.0), group="head")
        self.at_logits = plan.site("logits")
        self.at_loss = plan.site("loss")

    def init_weights(self, seed: int) -> None:
        """Start every parameter from ``(seed, its name)``; identical on every device."""
        init_params(self, seed)

    def roles(self) -> dict[str, ParamRole]:
        """Role of every parameter, by state-dict name."""
        return {name: role for name, _, role in iter_roles(self)}

    def num_params(self) -> int:
        """Trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def _hidden(self, ids: Tensor, targets: Tensor | None) -> tuple[Tensor, Context]:
        """Ids [B, T] -> last stream, normalised, [B, T, D], and the pass's context."""
        table = self.tok_emb.weight.to(compute_dtype(self.tok_emb.weight))
        x = F.embedding(ids, table)
        rope = rope_tables(ids.shape[1], self.shape.head_dim, self.shape.rope_base, ids.device)
        ctx = Context(ids=ids, targets=targets, x0=x, rope=rope, num_layers=self.shape.num_layers)
        x = rms_norm(self.at_embed(x, ctx))
        ctx.x0 = x
        skips: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            ctx.layer = layer
            if layer >= self.num_encoder and skips:
                weight = self.skip_weights[layer - self.num_encoder].to(x.dtype)
                x = x + weight * skips.pop()
            x = block(x, ctx)
            if layer < self.num_encoder:
                skips.append(x)
        return rms_norm(x), ctx

    @property
    def _head(self) -> Tensor:
        """The output matrix [V, D]."""
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def _logits(self, hidden: Tensor, ctx: Context) -> Tensor:
        return self.at_logits(capped_logits(hidden, self._head, self.shape.softcap), ctx)

    def logits(self, ids: Tensor) -> Tensor:
        """Ids [B, T] int64 -> logits [B, T, V] fp32 of the token after each position."""
        return self._logits(*self._hidden(ids, None))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Ids and next ids, both [B, T] int64 -> mean cross-entropy, scalar fp32, nats/token."""
        hidden, ctx = self._hidden(ids, targets)
        if not len(self.at_logits) and not len(self.at_loss):
            return head_loss(hidden, self._head, targets, self.shape.softcap)
        ctx.logits = self._logits(hidden, ctx)
        return self.at_loss(cross_entropy(ctx.logits, targets), ctx)


def build_model(knobs: Knobs) -> GPT:
    """The model that ``knobs`` describe, parameters uninitialised.

    Only knobs of role shape and model decide structure; a missing knob counts as its default, so those
    kept in an artifact are enough. Raises KnobError for a name or value that is not valid.
    """
    return GPT({**REGISTRY.defaults(), **REGISTRY.parse(knobs)})
