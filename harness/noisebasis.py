"""What the gate believes about noise before a trial: shipped scale, calibration, earlier verdicts; and where from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from harness.gate.correlation import calibration_for
from harness.gate.policy import Policy, Prior, load_policy
from harness.tracks import Track, declared_track, differences, environment
from ledger.measured import CalibrationMeasured
from ledger.records import SearchStarted

NEVER = "never calibrated"
FOREIGN_DF, FOREIGN_INFLATION = 2.0, 1.5  # of a scale measured under another fingerprint: doubt it more than our own


def stale(
    records: Iterable[Any], fingerprint: str, parts: Mapping[str, str], track: str = "",
    now: Mapping[str, str] | None = None,
) -> str:
    """Why there is no calibration under ``fingerprint``, in words; "" when there is one.

    ``parts``: of the fingerprint, as ``tracks.fingerprint`` gave them. ``track`` keeps to that track's
    calibrations; the last one is compared part by part. What of the machine changed (processor, GPU, torch...) is
    named where a search was started under the old fingerprint, because that is where the ledger holds it; ``now``:
    today's ``tracks.environment``, by default that of a search started under today's fingerprint.
    """
    records = list(records)
    if calibration_for(records, fingerprint):
        return ""
    seen = [r.body for r in records if isinstance(r.body, CalibrationMeasured) and track in ("", r.body.track)]
    if not seen:
        return NEVER
    last = seen[-1]
    known = {r.body.fingerprint: r.body.environment for r in records if isinstance(r.body, SearchStarted)}
    old, new = last.environment or known.get(last.fingerprint), now or known.get(fingerprint)
    changed = differences(last.fingerprint_parts, parts, (old, new) if old and new else None)
    return "calibrated under another fingerprint: " + ("; ".join(changed) or "what it is made of has changed")


def prior_from_elsewhere(
    records: Iterable[Any], track: str, *, fingerprint: str = "", prior: Prior | None = None,
) -> Prior | None:
    """The track's prior with the scales of its last calibration under another fingerprint; None if there is none.

    Only the scale crosses: no mean does. It is inflated and counts for few degrees of freedom, because another
    machine, torch or corpus is another noise; ``source`` says where it is from. ``fingerprint``: today's, which is
    left out (its own calibration goes into the pool whole: ``correlation.noise_inputs``). ``prior``: what is replaced,
    by default the one that gate.toml ships for the track.
    """
    shipped = prior or load_policy(declared_track(track).policy_track).prior
    seen = [r.body for r in records if isinstance(r.body, CalibrationMeasured)
            and r.body.track == track and r.body.fingerprint != fingerprint and r.body.sigma_d > 0.0]
    if not seen:
        return None
    last = seen[-1]
    return dataclasses.replace(
        shipped, sigma_d=last.sigma_d, sigma_run=max(last.sigma_run, last.sigma_d / 2.0),
        df=min(shipped.df, FOREIGN_DF), inflation=max(shipped.inflation, FOREIGN_INFLATION),
        source=f"a calibration of {track} under another fingerprint ({last.fingerprint[:8]}), as a scale only: "
               f"{len(last.values)} seeds, {len(last.edits)} edits")


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
