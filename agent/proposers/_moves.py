"""Turns a line's moves into concrete candidates: what to set, why, and how strongly to prefer it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from agent.contract import Context
from agent.knowledge import Move
from agent.proposers._history import Probe, Trend, keeps, near_misses, number, trend
from agent.sizes import iso_byte_shapes
from trainer.knobs import REGISTRY, Knob, KnobValue

AGAINST_EVIDENCE = 0.35
"""Weight of a step that the evidence does not point to, against 1 for one that it does."""

WITH_THE_WIND = 1.5
"""Weight factor for a rung beyond one that was just kept."""

SETTLED_AFTER = 3
"""A kept technique is old enough for a simplification trial once this many keeps came after it."""

NEAR_MISSES = 6
"""How many near misses take part in combinations (the best ones): 15 pairs at most."""

MIN_GAP = 0.06
"""A bracket narrower than this (relative; absolute for values near 1) is not worth a trial."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One concrete step. ``weight`` is relative within its line."""

    kind: str
    change: Mapping[str, KnobValue]
    bpb: float  # predicted change of val_bpb
    weight: float
    why: str
    move: Move
    records: tuple[str, ...] = ()  # trial ids
    against: bool = False  # the other way than the evidence points


def candidates(move: Move, context: Context) -> Iterator[Candidate]:
    """Every concrete step of ``move`` from the incumbent. Locked knobs are never touched."""
    makers = {
        "knobs": _set, "ladder": _ladder, "scale": _scale, "reshape": _reshape,
        "combine": _combine, "simplify": _simplify,
    }
    for candidate in makers[move.kind](move, context):
        change = {k: v for k, v in candidate.change.items() if context.incumbent[k] != v}
        if change and not context.locked & set(change):
            yield Candidate(
                kind=candidate.kind, change=change, bpb=candidate.bpb, why=candidate.why, move=candidate.move,
                weight=candidate.weight * _repeated(change, context), records=candidate.records,
                against=candidate.against,
            )


def _repeated(change: Mapping[str, KnobValue], context: Context) -> float:
    """Discount for the very same change tried before on another incumbent (this one is excluded later)."""
    factor = 1.0
    for trial in context.history:
        if dict(trial.change) == dict(change) and trial.verdict != "keep":
            noise = trial.reason in ("rejected.noise", "rejected.immaterial")
            factor *= 0.7 if noise or not trial.same_fingerprint else 0.3
    return factor


def _size(bpb: float) -> float:
    """Preference for larger predicted gains: the square root of it in units of 0.001 bpb, at least 0.5."""
    return max(math.sqrt(max(-bpb, 0.0) / 0.001), 0.5)


def _set(move: Move, context: Context) -> Iterator[Candidate]:
    weight, bpb, records = _size(move.bpb), move.bpb, []
    for name, value in move.knobs.items():
        factor, measured, seen = _direction(move, REGISTRY.get(name), value, context)
        weight, records = weight * factor, records + seen
        bpb = measured if measured is not None else bpb
    toggle = all(REGISTRY.get(n).kind in (bool, str) or context.incumbent[n] == 0 for n in move.knobs)
    kind = "toggle" if toggle else "set"
    yield Candidate(
        kind=kind, change=move.knobs, bpb=bpb, weight=weight, why=move.why, move=move,
        records=tuple(dict.fromkeys(records)),
    )


def _direction(
    move: Move, knob: Knob, value: KnobValue, context: Context
) -> tuple[float, float | None, list[str]]:
    """(weight factor, prediction from our own trials if any, trial ids) for moving ``knob`` to ``value``."""
    here, there = number(context.incumbent[knob.name]), number(value)
    if here is None or there is None or here == there:
        return 1.0, None, []
    known = trend(context, knob.name)
    blocked = known.blocked(there, here)
    if blocked is not None:
        return (0.1 if blocked.score <= -1 else 0.5), None, [blocked.trial.trial]
    if known.rising(there, here) and known.winner is not None:
        gain = known.winner.trial.delta_bpb
        halved = gain / 2 if gain is not None and gain < 0 else None
        return WITH_THE_WIND, halved, [known.winner.trial.trial]
    if known.winner is not None:  # back towards where a keep came from
        return 0.2, None, [known.winner.trial.trial]
    return 1.0, None, []


def _ladder(move: Move, context: Context) -> Iterator[Candidate]:
    knob = REGISTRY.get(move.ladder)
    here = context.incumbent[knob.name]
    position = number(here)
    if position is None:
        for value in knob.ladder:
            yield Candidate(
                kind="toggle", change={knob.name: value}, bpb=move.bpb, weight=_size(move.bpb), why=move.why,
                move=move,
            )
        return
    yield from _rungs(move, knob, position, context)
    yield from _brackets(move, knob, position, trend(context, knob.name))


def _rungs(move: Move, knob: Knob, here: float, context: Context) -> Iterator[Candidate]:
    """The next rung on the way that was kept last, else where the evidence points, else on both sides.

    The side that the evidence does not point to is offered once the pointed one is blocked or at its
    end; the way back from a keep is left to the brackets.
    """
    known = trend(context, knob.name)
    rungs = sorted(float(v) for v in knob.ladder)
    steps = {
        "up": next((v for v in rungs if v > here), None),
        "down": next((v for v in reversed(rungs) if v < here), None),
    }
    lost = {side: v is not None and _lost(known, v, here) for side, v in steps.items()}
    pointed = steps.get(move.toward)
    open_ahead = pointed is not None and not lost[move.toward]
    for side, rung in steps.items():
        if rung is None or lost[side]:
            continue
        rising = known.rising(rung, here)
        against = not rising and bool(move.toward) and side != move.toward
        if (against and open_ahead) or (known.winner is not None and not rising):
            continue
        factor, measured, seen = _direction(move, knob, knob.parse(rung), context)
        bpb = measured if measured is not None else move.bpb / 4 if against else move.bpb
        yield Candidate(
            kind="ladder", change={knob.name: knob.parse(rung)}, bpb=bpb, move=move, records=tuple(seen),
            weight=_size(bpb) * factor * (AGAINST_EVIDENCE if against else 1.0), against=against,
            why="the last step in this direction was kept" if rising else move.why,
        )


def _lost(known: Trend, value: float, here: float) -> bool:
    """Whether a step towards ``value``, no longer than this one, was measured worse from here."""
    blocked = known.blocked(value, here)
    return blocked is not None and blocked.score <= -1


def _brackets(move: Move, knob: Knob, here: float, known: Trend) -> Iterator[Candidate]:
    """Midpoints between a kept value and its measured neighbours on both sides."""
    winner = known.winner
    start = number(winner.old) if winner else None
    if winner is None or start is None:
        return
    gain = winner.trial.delta_bpb
    bpb = gain / 4 if gain is not None and gain < 0 else move.bpb / 4
    neighbours: list[tuple[float, Probe]] = [(start, winner)]
    for probe in known.around:
        there = number(probe.new)
        if there is not None:
            neighbours.append((there, probe))
    for side in (lambda v: v < here, lambda v: v > here):
        near = min((n for n in neighbours if side(n[0])), key=lambda n: abs(n[0] - here), default=None)
        value = None if near is None else midpoint(here, near[0], move.spacing, knob)
        if near is None or value is None:
            continue
        yield Candidate(
            kind="bracket", change={knob.name: value}, bpb=bpb, weight=_size(bpb) * 0.8,
            why=f"half-way between the kept {here:g} and {near[0]:g}, which was measured worse", move=move,
            records=tuple(dict.fromkeys((winner.trial.trial, near[1].trial.trial))),
        )


def midpoint(a: float, b: float, spacing: str, knob: Knob) -> KnobValue | None:
    """A rounded value strictly between ``a`` and ``b``; None when they are too close to tell apart.

    ``spacing``: linear = arithmetic mean; log = geometric mean; one-minus-log = geometric mean of the
    distances to 1 (for betas and momenta).
    """
    if spacing == "one-minus-log" and a < 1 and b < 1:
        gap, mean = abs(math.log((1 - a) / (1 - b))), 1 - math.sqrt((1 - a) * (1 - b))
    elif spacing == "log" and a > 0 and b > 0:
        gap, mean = abs(math.log(a / b)), math.sqrt(a * b)
    else:
        gap, mean = abs(a - b) / max(abs(a), abs(b), 1e-12), (a + b) / 2
    if gap < MIN_GAP:
        return None
    value = float(f"{mean:.3g}") if knob.kind is float else round(mean)
    return knob.parse(value) if min(a, b) < value < max(a, b) else None


def _scale(move: Move, context: Context) -> Iterator[Candidate]:
    change: dict[str, KnobValue] = {}
    weight, bpb, records = _size(move.bpb), move.bpb, []
    for name, factor in move.factors.items():
        knob, here = REGISTRY.get(name), number(context.incumbent[name])
        if here is None or name in context.locked:
            continue
        value = float(f"{here * factor:.3g}")
        if (knob.low is not None and value < knob.low) or (knob.high is not None and value > knob.high):
            continue
        change[name] = value
        seen_factor, measured, seen = _direction(move, knob, value, context)
        weight, records = weight * seen_factor, records + seen
        bpb = measured if measured is not None else bpb
    if change:
        yield Candidate(
            kind="scale", change=change, bpb=bpb, weight=weight, why=move.why, move=move,
            records=tuple(dict.fromkeys(records)),
        )


def _reshape(move: Move, context: Context) -> Iterator[Candidate]:
    vary = [n for n in move.vary if n not in context.locked]
    for rank, change in enumerate(iso_byte_shapes(context.incumbent, vary)):
        layers = int(context.incumbent["num_layers"])
        deeper = int(change.get("num_layers", layers)) > layers
        pointed = not move.toward or deeper == (move.toward == "up")
        weight = _size(move.bpb) / (1 + 0.5 * rank) * (1.0 if pointed else AGAINST_EVIDENCE)
        yield Candidate(
            kind="reshape", change=change, bpb=move.bpb if pointed else move.bpb / 4, weight=weight,
            why=move.why, move=move, against=not pointed,
        )


def _combine(move: Move, context: Context) -> Iterator[Candidate]:
    for first, second in itertools.combinations(near_misses(context)[:NEAR_MISSES], 2):
        if set(first.change) & set(second.change):
            continue
        gain = (first.delta_bpb or 0.0) + (second.delta_bpb or 0.0)
        why = (
            f"two near misses on different knobs, {first.trial} ({first.delta_bpb:+.4f}) and "
            f"{second.trial} ({second.delta_bpb:+.4f}), may be visible together; {move.why}"
        )
        yield Candidate(
            kind="combine", change={**first.change, **second.change}, bpb=gain / 2, weight=_size(gain / 2),
            why=why, move=move, records=(first.trial, second.trial),
        )


def _simplify(move: Move, context: Context) -> Iterator[Candidate]:
    """Switch off a technique (a knob whose default is "off") that was kept long ago."""
    kept = keeps(context)
    for age, trial in enumerate(reversed(kept)):
        if age < SETTLED_AFTER:
            continue
        for name in trial.change:
            off = REGISTRY.get(name).default
            off_by_default = not isinstance(off, str) and not off
            if not off_by_default or context.incumbent[name] != trial.change[name]:
                continue
            yield Candidate(
                kind="simplify", change={name: off}, bpb=move.bpb, weight=1.0, move=move,
                records=(trial.trial,), why=f"{name} was kept in {trial.trial}, {age} keeps ago; {move.why}",
            )
