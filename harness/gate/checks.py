"""What must hold before figures are compared at all, and the hard limits that no gain can buy off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from harness.gate.policy import Policy
from ledger.records import RunFigures, SubCheck

_SAME = ("evaluator_hash", "data_fingerprint", "split", "eval_tokens", "eval_bytes")
_FINITE = ("val_bpb", "val_loss", "train_seconds", "eval_seconds", "wall_seconds", "step_ms",
           "final_train_loss")


class GateError(ValueError):
    """Figures that must not be compared. Not a verdict: nothing about the idea can be concluded."""


@dataclass(frozen=True)
class Sides:
    """Both sides, ordered by k. ``pairs`` = how many leading candidate runs have their partner."""

    control: tuple[RunFigures, ...]
    candidate: tuple[RunFigures, ...]
    pairs: int

    def matched(self, n: int) -> list[tuple[RunFigures, RunFigures]]:
        """The first ``n`` pairs (control, candidate), n <= ``pairs``."""
        by_k = {r.k: r for r in self.control}
        return [(by_k[r.k], r) for r in self.candidate[:n]]


def _name(run: RunFigures) -> str:
    return f"run {run.run_id} (k {run.k}, seed {run.seed})"


def _check_run(run: RunFigures) -> None:
    """Every figure finite and possible."""
    for name in _FINITE:
        value = getattr(run, name)
        if not math.isfinite(value):
            raise GateError(f"{_name(run)}: {name} = {value!r}; valid: a finite number. A non-finite run is "
                            "recorded as failed.nan, not judged")
    if run.val_bpb <= 0.0:
        raise GateError(f"{_name(run)}: val_bpb = {run.val_bpb!r}; valid: above 0")
    if run.step_ms <= 0.0:
        raise GateError(f"{_name(run)}: step_ms = {run.step_ms!r}; valid: above 0")
    if run.artifact_bytes <= 0 or run.code_bytes < 0:
        raise GateError(f"{_name(run)}: artifact_bytes = {run.artifact_bytes}, "
                        f"code_bytes = {run.code_bytes}; valid: above 0, and 0 or more")


def _check_side(runs: Sequence[RunFigures], side: str) -> None:
    """No run or seed twice, and one code tree."""
    for name in ("k", "seed", "run_id"):
        seen: set[object] = set()
        for run in runs:
            value = getattr(run, name)
            if value in seen:
                raise GateError(f"{side}: {name} {value!r} occurs twice; every run counts once")
            seen.add(value)
    trees = sorted({r.tree_hash for r in runs})
    if len(trees) > 1:
        raise GateError(f"{side}: runs of {len(trees)} code trees ({', '.join(trees)}); one side is one "
                        "configuration, measure it again")


def _check_same(runs: Iterable[RunFigures]) -> None:
    """One evaluator, one data set, one slice over both sides: else never compare."""
    runs = list(runs)
    known = {r.fingerprint: r for r in runs if r.fingerprint}  # "": a run of before it was recorded
    if len(known) > 1:
        (a, x), (b, y) = list(known.items())[:2]
        raise GateError(f"fingerprint differs: {a[:12]} of {_name(x)}, {b[:12]} of {_name(y)}: another track, "
                        "data set, evaluator, machine or torch. Figures compare only within one fingerprint, measure "
                        "the incumbent again (`autoresearch track show` and `search --plan` say what differs)")
    for name in _SAME:
        first = runs[0]
        for run in runs[1:]:
            if getattr(run, name) != getattr(first, name):
                raise GateError(
                    f"{name} differs: {getattr(first, name)!r} in {_name(first)}, {getattr(run, name)!r} in "
                    f"{_name(run)}; figures compare only within one fingerprint, measure the incumbent again")


def prepare(control: Sequence[RunFigures], candidate: Sequence[RunFigures]) -> Sides:
    """Order both sides and check that they may be compared. Raises GateError.

    Pairs are the candidate's runs at consecutive k, from its smallest, that have a control of the same k
    and seed: a gap (a run that is still out) ends the list, so that runs which finish out of order don't
    choose which figures are looked at. Same k with another seed is refused.
    """
    if not candidate:
        raise GateError("no candidate run to judge")
    if not control:
        raise GateError("no control run: the incumbent is measured before a candidate is judged")
    ctl = tuple(sorted(control, key=lambda r: r.k))
    cand = tuple(sorted(candidate, key=lambda r: r.k))
    for run in (*ctl, *cand):
        _check_run(run)
    _check_side(ctl, "control")
    _check_side(cand, "candidate")
    _check_same((*ctl, *cand))
    by_k = {r.k: r for r in ctl}
    for run in cand:
        partner = by_k.get(run.k)
        if partner is not None and partner.seed != run.seed:
            raise GateError(f"{_name(run)} against control {_name(partner)}: a pair shares its seed; run the "
                            "control again on the candidate's seed list")
    pairs = 0
    while pairs < len(cand) and cand[pairs].k == cand[0].k + pairs and cand[pairs].k in by_k:
        pairs += 1
    return Sides(control=ctl, candidate=cand, pairs=pairs)


def leading(runs: Sequence[RunFigures]) -> int:
    """How many runs, ordered by k, stand at consecutive k from the smallest."""
    n = 0
    while n < len(runs) and runs[n].k == runs[0].k + n:
        n += 1
    return n


def total_bytes(run: RunFigures) -> int:
    """What counts against the cap: compressed weights + code."""
    return run.artifact_bytes + run.code_bytes


def byte_margin(policy: Policy, worst: int) -> int:
    """Bytes to keep free beside the worst seed: artifacts vary from run to run."""
    return max(policy.byte_margin_bytes, math.ceil(worst * policy.byte_margin_fraction))


def check_bytes(policy: Policy, candidate: Sequence[RunFigures], cap_bytes: int) -> SubCheck:
    """Worst seed + margin <= cap. Raises GateError on a cap that is no cap."""
    if cap_bytes <= 0:
        raise GateError(f"track cap = {cap_bytes} bytes; valid: above 0 (every track has a cap)")
    worst = max(candidate, key=total_bytes)
    size = total_bytes(worst)
    margin = byte_margin(policy, size)
    room = cap_bytes - size - margin
    detail = (f"worst seed k {worst.k}: {worst.artifact_bytes} artifact + {worst.code_bytes} code + {margin} "
              f"margin = {size + margin} of {cap_bytes} bytes, {abs(room)} "
              f"{'free' if room >= 0 else 'too many'}")
    return SubCheck(name="bytes", passed=room >= 0, detail=detail)


@dataclass(frozen=True, kw_only=True)
class Converged:
    """How a track predicts the size of a model trained for long: short runs compress far better."""

    ratio: float  # artifact bytes per payload byte
    cap_bytes: int


def check_converged(candidate: Sequence[RunFigures], converged: Converged) -> SubCheck:
    """Code + ratio * payload, the largest seed, within the track's cap for converged models.

    A run that did not report its payload (0 bytes) passes, and the check says so.
    """
    worst = max(candidate, key=lambda r: r.code_bytes + r.payload_bytes)
    size = worst.code_bytes + math.ceil(converged.ratio * worst.payload_bytes)
    if not worst.payload_bytes:
        return SubCheck(name="converged", passed=True, detail="the runs do not say their bytes before compression")
    detail = (f"trained for long: {worst.code_bytes} code + {converged.ratio:g} x {worst.payload_bytes} uncompressed = "
              f"{size} of {converged.cap_bytes} bytes")
    return SubCheck(name="converged", passed=size <= converged.cap_bytes, detail=detail)


Timing = Sequence[Sequence[float]]
"""[control ms, candidate ms] per pair of runs that took turns (or ran side by side) on one machine."""


def check_timing(timing: Timing) -> None:
    """Raises GateError on a pair that is no pair of times."""
    for pair in timing:
        if len(pair) != 2 or not all(math.isfinite(ms) and ms > 0.0 for ms in pair):
            raise GateError(f"timing pair {list(pair)!r}; valid: two step times in ms, each above 0")


def time_ratio(
    policy: Policy, control: Sequence[RunFigures], candidate: Sequence[RunFigures], timing: Timing = (),
) -> float:
    """Step time of the candidate over that of the control.

    Under a policy with ``timing_pairs``: the median of the ratios of the pairs that took turns. The judged runs'
    own step times may lie hours apart, so they are used only where there is no such pair.
    """
    if policy.timing_pairs and timing:
        return median(x / c for c, x in timing)
    return median(r.step_ms for r in candidate) / median(r.step_ms for r in control)


def check_runtime(
    policy: Policy, control: Sequence[RunFigures], candidate: Sequence[RunFigures], timing: Timing = (),
) -> SubCheck:
    """Step time within the hard ratio."""
    ratio = time_ratio(policy, control, candidate, timing)
    if policy.timing_pairs and timing:
        pairs = ", ".join(f"{c:.4g} -> {x:.4g}" for c, x in timing)
        detail = f"step ms of incumbent -> candidate, taking turns: {pairs}: median ratio {ratio:.4g}"
    else:
        detail = (f"median step {median(r.step_ms for r in candidate):.4g} ms against "
                  f"{median(r.step_ms for r in control):.4g} ms: ratio {ratio:.4g}")
    return SubCheck(name="runtime", passed=ratio <= policy.time_cap_ratio,
                    detail=f"{detail}, limit {policy.time_cap_ratio:g}")


def mean_bytes(runs: Sequence[RunFigures]) -> float:
    """Mean of code + artifact, bytes."""
    return fmean(total_bytes(r) for r in runs)
