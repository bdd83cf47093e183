"""Made-up runs for the gate's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.gate.policy import Policy, Prior
from ledger.records import RunFigures

CAP = 1_000_000

PRIOR = Prior(sigma_d=0.004, sigma_run=0.0105, source="tests")
POLICY = Policy(track="tests", alpha=0.01, spending="obrien-fleming", looks=(2, 3, 4), materiality_bpb=0.002,
                shrink_df=2.0, price_mb=0.05, price_time=0.001, time_deadband_pct=10.0, prior=PRIOR)


def run(k: int, bpb: float, side: str = "x", **changes: Any) -> RunFigures:
    """One run; everything that must agree between runs agrees."""
    figures: dict[str, Any] = {
        "run_id": f"{side}{k}", "seed": 1000 + k, "k": k, "val_bpb": bpb, "val_loss": 1.6 * bpb,
        "artifact_bytes": 600_000, "code_bytes": 20_000, "artifact_sha256": f"{side}{k}{bpb!r}",
        "train_seconds": 20.0, "eval_seconds": 2.0, "wall_seconds": 25.0, "step_ms": 80.0, "steps": 120,
        "tokens": 245_760, "params": 700_000, "peak_memory_bytes": 10**9, "final_train_loss": 4.0, "split": "val",
        "eval_tokens": 51_200, "eval_bytes": 120_000, "tree_hash": f"tree-{side}", "evaluator_hash": "ev",
        "data_fingerprint": "data",
    }
    return RunFigures(**{**figures, **changes})


def sides(
    control: Sequence[float], candidate: Sequence[float], **changes: Any
) -> tuple[list[RunFigures], list[RunFigures]]:
    """Control and candidate runs at k = 0, 1, ...; ``changes`` apply to the candidate."""
    return ([run(k, v, "c") for k, v in enumerate(control)],
            [run(k, v, "x", **changes) for k, v in enumerate(candidate)])


def gains(values: Sequence[float], base: float = 2.3, **changes: Any) -> tuple[list[RunFigures], list[RunFigures]]:
    """Sides whose paired differences (positive = better) are ``values``, with some luck shared by each pair."""
    luck = [0.01 * ((7 * k) % 5 - 2) for k in range(len(values))]
    control = [base + x for x in luck]
    return sides(control, [c - v for c, v in zip(control, values, strict=True)], **changes)
