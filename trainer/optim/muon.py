"""Muon (Jordan et al. 2024), as the challenge uses it: momentum, orthogonalised, no weight decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic a·x + b·x³ + c·x⁵ (Jordan et al. 2024): steepest at 0, holding singular values in about
[0.68, 1.13] rather than converging to 1."""
NS_EPS = 1e-7


def newton_schulz(stack: Tensor, steps: int) -> Tensor:
    """Push the singular values of every matrix of ``stack`` [n, r, c], r <= c, towards 1.

    Computed in the dtype of ``stack``: bf16 on CUDA, as the challenge does; fp32 on the CPU, where bf16
    products are slower without matrix units and would add noise for nothing.
    """
    a, b, c = NS_COEFFICIENTS
    x = stack / (stack.norm(dim=(1, 2), keepdim=True) + NS_EPS)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class _Bucket:
    """Matrices of one shape up to transposition, their momentum stacked as [n, r, c] with r <= c."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)
        self.tall = [p.shape[0] > p.shape[1] for p in params]
        # The challenge's factor for unlike sides, taken from the shape as the model has it.
        self.scale = [max(1.0, p.shape[0] / p.shape[1]) ** 0.5 for p in params]
        rows, cols = min(params[0].shape), max(params[0].shape)
        self.momentum = torch.zeros(len(params), rows, cols, dtype=torch.float32, device=params[0].device)

    def grads(self) -> Tensor:
        """Gradients [n, r, c] fp32; a parameter that took no part counts as zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        return torch.stack([g.mT if tall else g for g, tall in zip(grads, self.tall, strict=True)])


class Muon:
    """Momentum SGD whose every update is replaced by its nearest (semi-)orthogonal matrix, roughly.

    ``buf = mu·buf + g;  u = g + mu·buf;  p -= lr · sqrt(max(1, rows/cols)) · NS(u)``. Matrices of equal
    shape go through Newton-Schulz together: fewer, larger products.
    """

    def __init__(self, params: Sequence[nn.Parameter], ns_steps: int) -> None:
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}: "
                                 "give it the role group 'scalar'")
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault((min(p.shape), max(p.shape)), []).append(p)
        self._buckets = [_Bucket(group) for group in by_shape.values()]
        self._ns_steps = ns_steps
        self._ns: Callable[[Tensor, int], Tensor] = newton_schulz

    def compile(self) -> None:
        """Run Newton-Schulz through torch.compile from now on."""
        self._ns = torch.compile(newton_schulz, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """One update from the gradients in place."""
        for bucket in self._buckets:
            grads = bucket.grads()
            bucket.momentum.mul_(momentum).add_(grads)
            update = grads.add_(bucket.momentum, alpha=momentum)
            update = self._ns(update.bfloat16() if update.is_cuda else update, self._ns_steps)
            parts = [u.mT if tall else u for u, tall in zip(update.unbind(), bucket.tall, strict=True)]
            for p, part, scale in zip(bucket.params, parts, bucket.scale, strict=True):
                p.add_(part, alpha=-lr * scale)

    def state(self) -> dict[str, Any]:
        """Momentum stacks, in bucket order."""
        return {"momentum": [b.momentum.clone() for b in self._buckets]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave for the same parameters."""
        for bucket, kept in zip(self._buckets, state["momentum"], strict=True):
            bucket.momentum.copy_(kept)

    def reset(self) -> None:
        """Forget all momentum."""
        for bucket in self._buckets:
            bucket.momentum.zero_()
