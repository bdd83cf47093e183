"""What may be kept without a gain: fewer bytes, less time, fewer settings, at a score that is not worse.

A candidate with such an advantage is kept when the lower bound of its gain lies above minus the policy's
non-inferiority margin. It must be a real advantage (material, by the policy) that costs nothing elsewhere.
Every such keep may lose up to the margin, so many in a row may add up to a loss: the honest cumulative gain,
measured on fresh seeds after every keep, is what shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.gate.policy import Policy


@dataclass(frozen=True)
class Advantage:
    """``reason``: kept.cheaper | kept.faster | kept.simpler; ``text``: what it is, in words."""

    reason: str
    text: str

    def worth(self, utility: float) -> bool:
        """Bytes and time have prices: what they save must pay for what the score loses. Simplicity has none."""
        return self.reason == "kept.simpler" or utility >= 0.0


def advantage(
    policy: Policy, delta_bytes: float, delta_step_pct: float, cap_bytes: int, timing: Sequence[Sequence[float]],
    simpler: int,
) -> Advantage | None:
    """The candidate's advantage beside its score, if it has one; bytes before time before simplicity.

    ``delta_bytes``: candidate - control. ``delta_step_pct``: % more step time. ``timing``: pairs of step times that
    took turns; an advantage in time needs ``timing_pairs`` of them, each in favour of the candidate. ``simpler``:
    settings that the candidate has fewer.
    """
    room = policy.cheaper_bytes_fraction * cap_bytes
    heavier, slower = delta_bytes > room, delta_step_pct > policy.time_deadband_pct
    if policy.cheaper_bytes_fraction > 0.0 and delta_bytes <= -room and not slower:
        return Advantage("kept.cheaper", f"{-delta_bytes:,.0f} bytes fewer, at least {room:,.0f} asked for")
    measured = len(timing) >= policy.timing_pairs > 0
    quicker = measured and all(x < c for c, x in timing)
    if policy.faster_pct > 0.0 and quicker and delta_step_pct <= -policy.faster_pct and not heavier:
        return Advantage("kept.faster", f"{-delta_step_pct:.1f}% less step time in every one of {len(timing)} timing "
                                        f"pairs, at least {policy.faster_pct:g}% asked for")
    if policy.simpler_settings > 0 and simpler >= policy.simpler_settings and not heavier and not slower:
        return Advantage("kept.simpler", f"{simpler} setting{'s' if simpler > 1 else ''} fewer")
    return None
