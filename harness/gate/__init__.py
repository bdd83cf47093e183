"""The gate: keep or reject, from figures alone (no files but the policy, no torch, no clock, no chance).

Plain words for a recorded verdict: ``harness.gate.explain.explain``.
"""

from harness.gate.checks import GateError
from harness.gate.noise import Noise, NoiseError, pool, pool_decided, shipped
from harness.gate.policy import Policy, PolicyError, load_policy
from harness.gate.verdict import BreadthVerdict, breadth_verdict, confirm_step, recompute

__all__ = [
    "BreadthVerdict", "GateError", "Noise", "NoiseError", "Policy", "PolicyError", "breadth_verdict",
    "confirm_step", "load_policy", "pool", "pool_decided", "recompute", "shipped",
]
