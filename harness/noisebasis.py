"""What the gate believes about noise before a trial: shipped scale, calibration, earlier verdicts; and where from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from harness.calibrate import NEVER, prior_from_elsewhere, stale
from harness.gate.correlation import calibration_for, noise_inputs
from harness.gate.noise import Noise, pool_decided
from harness.gate.policy import Policy
from harness.tracks import Track, environment
from ledger.measured import CalibrationMeasured
from ledger.records import Decided


def noise_basis(
    records: Iterable[Any], track: Track, policy: Policy, fingerprint: str, parts: Mapping[str, str],
    note: Callable[[str], None],
) -> tuple[Policy, CalibrationMeasured | None]:
    """(policy, calibration) for a search under ``fingerprint``.

    A calibration under another fingerprint (another machine, torch, data) lends its scale as the policy's prior,
    inflated; no figure of it is ever compared. Says so, and what has changed.
    """
    records = list(records)
    found = calibration_for(records, fingerprint)
    if found is not None or track.meaningless:
        return policy, found
    why = stale(records, fingerprint, parts, track.name, environment(track))
    prior = prior_from_elsewhere(records, track.name, fingerprint=fingerprint, prior=policy.prior)
    if prior is not None:
        note(f"noise: {why}; its scale serves as a guess. `autoresearch gate calibrate --track {track.name}` measures "
             "it here")
        return dataclasses.replace(policy, prior=prior), None
    if why and why != NEVER:
        note(f"noise: {why}")
    return policy, None


def noise_before(policy: Policy, decided: Iterable[Decided], calibration: CalibrationMeasured | None) -> Noise:
    """The pool that a verdict starts from: earlier verdicts of this fingerprint and its calibration."""
    pairs, runs = noise_inputs(calibration) if calibration else ([], [])
    return pool_decided(policy, decided, runs, pairs)
