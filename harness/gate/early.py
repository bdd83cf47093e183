"""Giving a breadth run up before its end: only ever to reject, by its loss on the dev slice.

The figure is the training process's own word. That is safe because it can only condemn: a candidate that
flatters itself here goes on, and is then judged by the referee like any other.
"""

from __future__ import annotations

import math

from harness.gate.policy import Policy
from ledger.records import EarlyStop, RunFigures


def stops(policy: Policy, control: RunFigures, step: int, of: int, candidate: float) -> EarlyStop | None:
    """Whether a run whose dev loss is ``candidate`` (nats/token) after ``step`` of ``of`` steps is given up.

    Compared with the incumbent's dev loss at the same step and seed; never without one, and only at the
    policy's ``early_fractions`` of the run. ``early_nats`` are measured on a panel (``gate panel``).
    """
    for fraction, limit in zip(policy.early_fractions, policy.early_nats, strict=True):
        if step != checkpoint(fraction, of) or not math.isfinite(candidate):
            continue
        known = {int(at): loss for at, loss in control.dev}
        if step in known and candidate - known[step] > limit:
            return EarlyStop(k=control.k, seed=control.seed, step=step, of=of, control=known[step],
                             candidate=candidate, threshold=limit)
    return None


def checkpoint(fraction: float, of: int) -> int:
    """The step at which a fraction of a run is reached."""
    return max(1, round(fraction * of))


def dev_every(policy: Policy, steps: int) -> int:
    """Steps between dev checks so that every checkpoint of the policy is one of them; 0 = none asked for."""
    if not policy.early_fractions:
        return 0
    return math.gcd(*(checkpoint(f, steps) for f in policy.early_fractions))
