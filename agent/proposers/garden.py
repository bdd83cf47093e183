"""The default proposer: offline, no key. Picks a research line by Thompson sampling, then a step on it.

A line's chance of giving a keep is a Beta distribution: its prior comes from the knowledge base, its
updates from the search's own trials. One draw per line decides the order in which lines are asked
for a step that is valid, new and allowed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

from agent.contract import Context, Exhausted, Proposal
from agent.knowledge import Knowledge, Line, load
from agent.proposers._history import posterior
from agent.proposers._moves import Candidate, candidates
from agent.sizes import predict_bytes, predict_step_time
from trainer.knobs import REGISTRY, KnobError, KnobValue

Knobs = dict[str, KnobValue]
TURNED = (
    "{change}: the way that the evidence points is closed here, so the optimum may lie on the other side; "
    "expected {bpb} bpb on {track}."
)


class Garden:
    """Deterministic in its context: the same context gives the same proposal, on every machine.

    ``kb_dir``: the knowledge base, read once. Raises KnowledgeError if it is broken.
    """

    name = "garden"
    slow = False

    def __init__(self, kb_dir: Path) -> None:
        self._knowledge = load(kb_dir)

    @property
    def knowledge(self) -> Knowledge:
        """The knowledge base in use."""
        return self._knowledge

    def propose(self, context: Context) -> Proposal:
        """One step: valid, never judged here before, never on a locked knob. Raises Exhausted."""
        rng = _rng(context)
        for line, chance in self._ranked(context, rng):
            for candidate in _drawn(line, context, rng):
                resolved = _resolved(candidate, context)
                if resolved is not None and not self._over_cap(candidate, resolved, context):
                    return self._proposal(line, chance, candidate, resolved, context)
        raise Exhausted(
            f"garden: no line of the knowledge base has a valid, untried step left on {context.track} "
            f"({len(context.tried_configs)} configurations judged): add a line or a knob, or stop here"
        )

    def posteriors(self, context: Context) -> dict[str, tuple[float, float]]:
        """Beta parameters (successes, failures) of every active line in this context."""
        return {
            line.id: posterior(self._knowledge.prior(line), line.id, context.history)
            for line in self._knowledge.active()
        }

    def _ranked(self, context: Context, rng: random.Random) -> list[tuple[Line, float]]:
        """Active lines with their posterior mean, best draw first."""
        beliefs = self.posteriors(context)
        draws = [(rng.betavariate(*beliefs[line.id]), line) for line in self._knowledge.active()]
        draws.sort(key=lambda d: (-d[0], d[1].id))
        return [(line, beliefs[line.id][0] / sum(beliefs[line.id])) for _, line in draws]

    @staticmethod
    def _over_cap(candidate: Candidate, resolved: Knobs, context: Context) -> bool:
        """Whether the predicted artifact breaks the track's cap (unknown sizes, 0, never do)."""
        if context.incumbent_bytes <= 0 or context.cap_bytes <= 0:
            return False
        grown = _bytes(candidate, resolved, context)
        return grown > 0 and context.incumbent_bytes + grown > context.cap_bytes

    def _proposal(
        self, line: Line, chance: float, candidate: Candidate, resolved: Knobs, context: Context
    ) -> Proposal:
        change = {name: resolved[name] for name in candidate.change}
        words = ", ".join(f"{n} {_show(context.incumbent[n])} -> {_show(v)}" for n, v in change.items())
        template = TURNED if candidate.against else line.hypothesis
        text = template.format(change=words, bpb=f"{candidate.bpb:+.4f}", track=context.track)
        evidence = dict.fromkeys((*candidate.move.evidence, *line.evidence))
        slower = predict_step_time(context.incumbent, resolved) + candidate.move.time_frac
        return Proposal(
            line=line.id,
            hypothesis=f"{text} Why: {candidate.why}. Chance of a keep on this line, by our record: {chance:.0%}.",
            change=change,
            move=candidate.kind,
            predicted={
                "val_bpb": round(candidate.bpb, 5),
                "bytes": _bytes(candidate, resolved, context),
                "step_time": round(slower, 4),
            },
            falsified_by=_falsifier(candidate, context),
            pages=(self._knowledge.cite(line.id),),
            records=(*candidate.records, *evidence),
        )


def _rng(context: Context) -> random.Random:
    """A stream of its own for every proposal of every search."""
    text = f"garden/1|{context.track}|{context.search}|{context.seed}|{context.number}"
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))


def _drawn(line: Line, context: Context, rng: random.Random) -> Iterator[Candidate]:
    """The line's candidates in an order drawn without replacement by weight (Efraimidis-Spirakis keys)."""
    found = [c for move in line.moves for c in candidates(move, context)]
    keyed = [(rng.random() ** (1 / max(c.weight, 1e-9)), i, c) for i, c in enumerate(found)]
    keyed.sort(key=lambda k: (-k[0], k[1]))
    yield from (c for _, _, c in keyed)


def _resolved(candidate: Candidate, context: Context) -> Knobs | None:
    """The candidate's full configuration, or None if it is invalid or already judged."""
    try:
        resolved = REGISTRY.resolve(context.incumbent, candidate.change)
    except KnobError:
        return None
    judged = REGISTRY.config_hash(resolved)
    return None if judged in context.tried_configs or judged == context.incumbent_config else resolved


def _bytes(candidate: Candidate, resolved: Knobs, context: Context) -> int:
    grown = predict_bytes(context.incumbent, resolved, context.incumbent_bytes)
    return grown + round(candidate.move.bytes_frac * context.incumbent_bytes)


def _show(value: KnobValue) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _falsifier(candidate: Candidate, context: Context) -> str:
    """A numeric statement that the measurement can contradict."""
    mean = f"the paired mean of val_bpb on {context.track}"
    if candidate.bpb < 0 and candidate.kind != "simplify":
        return f"{mean} does not fall by at least {-candidate.bpb / 2:.5f} (half of what is predicted)"
    margin = max(2 * candidate.bpb, 0.001)
    return f"{mean} rises by more than {margin:.4f}, or neither bytes nor step time fall"
