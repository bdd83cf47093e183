"""What a search's own trials say about lines and knobs: posteriors, trends, near misses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.contract import Context, PastTrial
from trainer.knobs import REGISTRY, KnobValue

FOREIGN = 0.5
"""Weight of an outcome measured under another fingerprint: it informs, it does not decide."""

KEPT = 2.0
"""Weight of a keep against 1 for a loss. Keeps are rare: if a good line wins six times in ten and a poor
one once in twenty, a keep speaks for the good line with ln 12 = 2.5, a loss against it with ln 2.4 = 0.9."""

FAILURE_WEIGHTS: Mapping[str, float] = {
    "rejected.noise": 0.5,  # nothing seen either way: half a failure
    "rejected.immaterial": 0.5,  # real but too small
    "rejected.duplicate": 0.0,  # says something of the proposer, nothing of the line
    "failed.infra": 0.0,  # never blamed on the idea
}
SLIGHT = 0.25
"""Weight of a trial that failed or was refused before the idea could be measured."""


def outcome(trial: PastTrial) -> tuple[float, float]:
    """(success, failure) pseudo-counts of one finished trial."""
    weight = 1.0 if trial.same_fingerprint else FOREIGN
    if trial.verdict == "keep":
        return weight * KEPT, 0.0
    if trial.reason in FAILURE_WEIGHTS:
        return 0.0, weight * FAILURE_WEIGHTS[trial.reason]
    return 0.0, weight * (1.0 if trial.verdict == "reject" else SLIGHT)


def posterior(prior: tuple[float, float], line_id: str, history: Iterable[PastTrial]) -> tuple[float, float]:
    """Beta parameters of P(the line's next move is kept), after the history."""
    successes, failures = prior
    for trial in history:
        if trial.line == line_id:
            good, bad = outcome(trial)
            successes, failures = successes + good, failures + bad
    return successes, failures


@dataclass(frozen=True)
class Probe:
    """One trial seen from one knob: it went from ``old`` to ``new``."""

    trial: PastTrial
    old: KnobValue
    new: KnobValue

    @property
    def kept(self) -> bool:
        """Whether the value became the incumbent's."""
        return self.trial.verdict == "keep"

    @property
    def score(self) -> float:
        """1 kept, -1 worse, in between for noise (its sign counts a little), 0 if never measured."""
        if self.kept:
            return 1.0
        if self.trial.verdict != "reject" or self.trial.delta_bpb is None:
            return 0.0
        if self.trial.reason in ("rejected.noise", "rejected.immaterial"):
            return 0.2 if self.trial.delta_bpb < 0 else -0.4
        return -1.0


def number(value: KnobValue) -> float | None:
    """``value`` as a float if it is a number (a bool is not)."""
    return None if isinstance(value, (bool, str)) else float(value)


def probes(context: Context, knob: str) -> list[Probe]:
    """Every finished trial that changed ``knob``, oldest first, with the value it started from.

    The start is the record's own ``previous``; without one, the value set by the last keep before it;
    without one, the incumbent's value if no keep ever touched the knob, else the knob's default.
    """
    touched = [t for t in context.history if knob in t.change]
    kept_ever = any(t.verdict == "keep" for t in touched)
    current = REGISTRY.get(knob).default if kept_ever else context.incumbent[knob]
    out: list[Probe] = []
    for trial in touched:
        out.append(Probe(trial, trial.previous.get(knob, current), trial.change[knob]))
        if trial.verdict == "keep":
            current = trial.change[knob]
    return out


@dataclass(frozen=True)
class Trend:
    """What the search knows about moving one numeric knob from its present value."""

    winner: Probe | None  # the keep that set the present value
    around: tuple[Probe, ...]  # trials that started from the present value and were not kept

    def blocked(self, value: float, here: float) -> Probe | None:
        """The worst trial from here in the direction of ``value`` that did not go beyond it."""
        found = None
        for probe in self.around:
            there = number(probe.new)
            same_side = there is not None and (there - here) * (value - here) > 0
            if same_side and there is not None and abs(there - here) <= abs(value - here) and probe.score < 0:
                found = probe if found is None or probe.score < found.score else found
        return found

    def rising(self, value: float, here: float) -> bool:
        """Whether ``value`` continues in the direction of the last keep."""
        start = number(self.winner.old) if self.winner else None
        return start is not None and (here - start) * (value - here) > 0


def trend(context: Context, knob: str) -> Trend:
    """Summarise the probes of ``knob`` around the incumbent's value."""
    here = context.incumbent[knob]
    seen = probes(context, knob)
    winner = next((p for p in reversed(seen) if p.kept and p.new == here), None)
    return Trend(winner, tuple(p for p in seen if not p.kept and p.old == here and p.trial.same_fingerprint))


def near_misses(context: Context) -> list[PastTrial]:
    """Rejected for noise or immateriality, measured here, and on the better side of zero; best first.

    Combinations are left out (a pair of pairs says nothing about its parts), and so are trials whose
    values the incumbent has by now.
    """
    found = [
        t for t in context.history
        if t.verdict == "reject" and t.reason in ("rejected.noise", "rejected.immaterial")
        and t.same_fingerprint and t.delta_bpb is not None and t.delta_bpb < 0 and t.change
        and t.move != "combine" and any(context.incumbent.get(k) != v for k, v in t.change.items())
    ]
    return sorted(found, key=lambda t: (t.delta_bpb or 0.0, t.trial))


def keeps(context: Context) -> list[PastTrial]:
    """Kept trials, oldest first."""
    return [t for t in context.history if t.verdict == "keep"]
