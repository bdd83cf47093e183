"""Causal grouped-query attention with normalised, rotated and scaled queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.init import ParamRole, Projection, add_param, constant
from trainer.model.norm import rms_norm
from trainer.model.rope import apply_rope
from trainer.model.sites import QKV, Context, Plan


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries [B, T, H, h] over keys and values [B, T, K, h] -> [B, T, H, h].

    Scale 1/sqrt(h); query head i uses key head i // (H / K).
    """
    return _attend_cuda(q, k, v) if q.is_cuda else _attend_cpu(q, k, v)


def _attend_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        is_causal=True, enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in plain products: torch's CPU kernel is slower at the short contexts that run there."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # The queries that share a key head stand one below the other: one product per key head, nothing repeated.
    rows = q.view(batch, length, kv_heads, group, width).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch * kv_heads, group * length, width)
    keys = k.transpose(1, 2).reshape(batch * kv_heads, length, width)
    values = v.transpose(1, 2).reshape(batch * kv_heads, length, width)
    scores = torch.bmm(rows, keys.mT).view(-1, length, length)
    future = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1)
    weights = torch.add(future, scores, alpha=width**-0.5).softmax(-1)
    y = torch.bmm(weights.view(-1, group * length, length), values)
    y = y.view(batch, kv_heads, group, length, width).permute(0, 3, 1, 2, 4)
    return y.reshape(batch, length, heads, width)


class Attention(nn.Module):
    """Multi-head attention of one block (challenge_spec, section 3)."""

    q_gain: nn.Parameter

    def __init__(self, plan: Plan, layer: int, q_gain_init: float) -> None:
        super().__init__()
        shape = plan.shape
        self.heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.head_dim = shape.head_dim
        dim, kv_dim = shape.model_dim, shape.num_kv_heads * shape.head_dim
        self.c_q = Projection(dim, dim)
        self.c_k = Projection(dim, kv_dim)
        self.c_v = Projection(dim, kv_dim)
        self.proj = Projection(dim, dim, init=constant(0.0))
        role = ParamRole(group="scalar", init=constant(q_gain_init), export="control")
        add_param(self, "q_gain", (shape.num_heads,), role)
        self.at_qkv = plan.site("qkv", layer)
        self.at_attn_out = plan.site("attn_out", layer)

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """Normalised stream [B, T, D] -> what attention adds to it, [B, T, D]."""
        batch, length, dim = h.shape
        # One product for all three: the narrow key and value maps are inefficient on their own.
        weight = torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight)).to(h.dtype)
        packed = F.linear(h, weight).view(batch, length, sum(self.heads), self.head_dim)
        q, k, v = self.at_qkv(QKV(*packed.split(self.heads, dim=2)), ctx)
        turned = apply_rope(rms_norm(torch.cat((q, k), dim=2)), ctx.rope)  # [B, T, H + K, h]
        q, k = turned.split(self.heads[:2], dim=2)
        y = attend(q * self.q_gain.to(h.dtype)[:, None], k, v)
        ctx.h = h
        y = self.at_attn_out(y, ctx)
        return self.proj(y.reshape(batch, length, dim))
