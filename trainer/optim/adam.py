"""Adam without weight decay, one launch for all of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Adam:
    """Adam (Kingma and Ba 2015) over parameter groups that differ in learning rate only.

    torch's fused kernel does the arithmetic; this class keeps its state in the open, so that a run can be
    stored, continued and reset without the bookkeeping of ``torch.optim``.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], beta1: float, beta2: float, eps: float) -> None:
        self._groups = [list(g) for g in groups]
        self._betas, self._eps = (beta1, beta2), eps
        self._first = [[torch.zeros_like(p) for p in g] for g in self._groups]
        self._second = [[torch.zeros_like(p) for p in g] for g in self._groups]
        # The fused kernel wants one step counter per parameter, on the parameter's device.
        self._steps = [[torch.zeros((), dtype=torch.float32, device=p.device) for p in g] for g in self._groups]

    @torch.no_grad()
    def step(self, lrs: Sequence[float]) -> None:
        """One update, with one learning rate per group. A parameter without gradient is left alone."""
        for i, (params, lr) in enumerate(zip(self._groups, lrs, strict=True)):
            live = [j for j, p in enumerate(params) if p.grad is not None]
            if not live:
                continue
            steps = [self._steps[i][j] for j in live]
            torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
            grads: list[Tensor] = [g for g in (params[j].grad for j in live) if g is not None]
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
                [params[j] for j in live], grads, [self._first[i][j] for j in live],
                [self._second[i][j] for j in live], [], steps,
                lr=lr, beta1=self._betas[0], beta2=self._betas[1], weight_decay=0.0, eps=self._eps,
                amsgrad=False, maximize=False,
            )

    def state(self) -> dict[str, Any]:
        """Moments and step counters, group by group."""
        kept = {"first": self._first, "second": self._second, "steps": self._steps}
        return {name: [[t.clone() for t in g] for g in groups] for name, groups in kept.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave for the same parameters."""
        for name, mine in (("first", self._first), ("second", self._second), ("steps", self._steps)):
            for group, kept in zip(mine, state[name], strict=True):
                for tensor, value in zip(group, kept, strict=True):
                    tensor.copy_(value)

    def reset(self) -> None:
        """Forget all moments and steps."""
        for groups in (self._first, self._second, self._steps):
            for tensor in (t for group in groups for t in group):
                tensor.zero_()
