"""From the last hidden state to the loss: tied or untied head, soft cap, cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 256
"""Positions handled at once on the CPU: 256 x 1,024 logits in fp32 are 1 MiB and stay in a core's L2."""


def capped_logits(hidden: Tensor, weight: Tensor, cap: float) -> Tensor:
    """Hidden [..., D] and head [V, D] -> ``cap·tanh(z/cap)``, [..., V] fp32 (fp64 for fp64 input)."""
    raw = F.linear(hidden, weight.to(hidden.dtype))
    raw = raw if raw.dtype == torch.float64 else raw.float()
    return cap * (raw / cap).tanh()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [..., V], target ids [...] -> mean cross-entropy, scalar, nats/token."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


class _ChunkedLoss(torch.autograd.Function):
    """:func:`capped_logits` and :func:`cross_entropy` by rows, with the gradients made on the way.

    The logits of a batch are by far its largest tensor. Made a few rows at a time they never leave the
    cache, and nothing of their size is allocated or kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        count = hidden.shape[0]
        losses = hidden.new_empty(count)
        wanted = hidden.requires_grad or weight.requires_grad
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, count, CHUNK_ROWS):
            rows = slice(start, min(start + CHUNK_ROWS, count))
            h, y = hidden[rows], targets[rows, None]
            bent = torch.mm(h, weight.T).div_(cap).tanh_()
            log_p = (bent * cap).log_softmax(-1)
            losses[rows] = log_p.gather(1, y).squeeze(1).neg_()
            if wanted:
                # d loss / d z = (p - onehot) · (1 - tanh²), the mean's 1/count applied in backward.
                grad = log_p.exp_()
                grad.scatter_add_(1, y, grad.new_full((1, 1), -1.0).expand(y.shape))
                grad.addcmul_(grad * bent, bent, value=-1.0)
                torch.mm(grad, weight, out=d_hidden[rows])
                d_weight.addmm_(grad.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0] / d_hidden.shape[0]
        return d_hidden * scale, d_weight * scale, None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Hidden [B, T, D], head [V, D], target ids [B, T] -> mean cross-entropy, scalar fp32, nats/token.

    On CUDA this is the plain composition, which the compiler fuses; on the CPU it goes by chunks.
    """
    if hidden.is_cuda:
        return cross_entropy(capped_logits(hidden, weight, cap), targets)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _ChunkedLoss.apply(flat, weight, targets.reshape(-1), cap)  # pyright: ignore[reportReturnType]
