"""A person's own idea through the same door: ``autoresearch try --set k=v --why TEXT``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.contract import Proposal
from trainer.knobs import REGISTRY, KnobValue


class ManualError(ValueError):
    """What was asked for cannot be tried; the message says what to change."""


def parse_settings(settings: Sequence[str]) -> dict[str, KnobValue]:
    """``["beta2=0.99", ...]`` as checked knob values. Raises ManualError, or KnobError for a bad knob."""
    out: dict[str, KnobValue] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ManualError(f"--set {text!r}: expected NAME=VALUE, for example --set beta2=0.99")
        knob = REGISTRY.get(name.strip())
        if knob.name in out:
            raise ManualError(f"--set {text!r}: knob {knob.name} is set twice; give it once")
        out[knob.name] = knob.parse(value.strip())
    return out


def manual_proposal(
    settings: Sequence[str],
    why: str,
    *,
    incumbent: Mapping[str, KnobValue],
    locked: frozenset[str] = frozenset(),
    predicted: Mapping[str, float] | None = None,
    falsified_by: str = "",
) -> Proposal:
    """One person's proposal, checked against the incumbent's resolved knobs and the track's locks.

    ``settings``: NAME=VALUE texts. ``why``: the hypothesis, in the person's own words. ``predicted``:
    signed changes as in :class:`Proposal`, optional. Raises ManualError or KnobError.
    """
    reason = why.strip()
    if not reason:
        raise ManualError("--why is empty: say in a sentence what you expect and why; the ledger keeps it")
    asked = parse_settings(settings)
    if not asked:
        raise ManualError("nothing to try: give one --set NAME=VALUE or more (see `autoresearch knobs`)")
    for name in sorted(locked & set(asked)):
        raise ManualError(
            f"knob {name} is fixed by the track (at {incumbent[name]}): runs that differ in it cannot be "
            "compared; choose another track, or leave it out"
        )
    change = {name: value for name, value in asked.items() if incumbent[name] != value}
    if not change:
        same = ", ".join(f"{n} = {v}" for n, v in asked.items())
        raise ManualError(f"{same}: the incumbent already has exactly this; there is nothing to measure")
    resolved = REGISTRY.resolve(incumbent, change)
    if REGISTRY.config_hash(resolved) == REGISTRY.config_hash(incumbent):
        idle = ", ".join(sorted(change))
        raise ManualError(f"{idle}: not active in this configuration, so nothing changes")
    expected = dict(predicted or {})
    bpb = expected.get("val_bpb", 0.0)
    least = f"by at least {-bpb / 2:.5f}" if bpb < 0 else "measurably"
    return Proposal(
        line="manual", hypothesis=reason, change=change, move="manual", predicted=expected,
        falsified_by=falsified_by.strip() or f"val_bpb does not fall {least}",
    )
