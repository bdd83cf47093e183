"""Schedules as functions of the fraction of the run, so that a short run gets all of them."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.model.sites import Knobs


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning-rate multiplier and Muon momentum at a fraction f of the run, 0 <= f <= 1."""

    warmdown_frac: float
    min_lr: float
    momentum: float
    momentum_start: float
    momentum_warmup_frac: float

    @classmethod
    def from_knobs(cls, knobs: Knobs) -> Schedule:
        """Read the five knobs."""
        return cls(
            warmdown_frac=float(knobs["warmdown_frac"]), min_lr=float(knobs["min_lr"]),
            momentum=float(knobs["muon_momentum"]), momentum_start=float(knobs["muon_momentum_warmup_start"]),
            momentum_warmup_frac=float(knobs["muon_momentum_warmup_frac"]),
        )

    def lr_scale(self, fraction: float) -> float:
        """1 until the last ``warmdown_frac`` of the run, then linear to 0 at its end, never below ``min_lr``.

        With fraction = step / steps (0-based) this is the challenge's rule for ``WARMDOWN_ITERS`` steps.
        """
        left = max(1.0 - fraction, 0.0)
        if left >= self.warmdown_frac:
            return 1.0
        return max(left / self.warmdown_frac, self.min_lr)

    def muon_momentum(self, fraction: float) -> float:
        """Linear from ``momentum_start`` to ``momentum`` over the first ``momentum_warmup_frac``."""
        if fraction >= self.momentum_warmup_frac:
            return self.momentum
        done = fraction / self.momentum_warmup_frac
        return self.momentum_start + done * (self.momentum - self.momentum_start)


def run_fraction(step: int, steps: int, elapsed_s: float, limit_s: float) -> float:
    """Share of the run that lies behind, at the start of 0-based ``step``, in [0, 1].

    With a wall-clock budget (``limit_s`` > 0) the training clock leads; a run whose steps would be over
    sooner follows the steps, else it would end before its warm-down.
    """
    fraction = step / steps
    if limit_s > 0:
        fraction = max(fraction, elapsed_s / limit_s)
    return min(fraction, 1.0)
