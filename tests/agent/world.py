"""A synthetic search: a world that judges proposals, and a loop that feeds the verdicts back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from agent.contract import Context, PastTrial, Proposal
from tests.agent.support import LOCKED, POCKET
from trainer.knobs import REGISTRY, KnobValue

World = Callable[[Mapping[str, KnobValue]], float]  # resolved knobs -> true val_bpb
Propose = Callable[[Context], Proposal]
MATERIAL, NOISE = 0.004, 0.0015


@dataclass
class Search:
    """State of one simulated search; ``step`` proposes, judges without error, and learns."""

    propose: Propose
    world: World
    seed: int
    incumbent: dict[str, KnobValue] = field(default_factory=lambda: REGISTRY.resolve(POCKET))
    history: list[PastTrial] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    proposals: list[Proposal] = field(default_factory=list)

    def context(self) -> Context:
        config = REGISTRY.config_hash(self.incumbent)
        return Context(
            track="pocket", search="sim", seed=self.seed, number=len(self.history) + 1, incumbent=self.incumbent,
            incumbent_config=config, locked=LOCKED, history=tuple(self.history),
            tried_configs=frozenset(self.tried | {config}), cap_bytes=700_000, incumbent_bytes=560_000,
        )

    def step(self) -> PastTrial:
        context = self.context()
        proposal = self.propose(context)
        resolved = REGISTRY.resolve(context.incumbent, proposal.change)
        delta = self.world(resolved) - self.world(context.incumbent)
        keep = delta <= -MATERIAL
        reason = "kept.gain" if keep else "rejected.worse" if delta > NOISE else "rejected.noise"
        trial = PastTrial(
            trial=f"t{context.number}", line=proposal.line, move=proposal.move, change=dict(proposal.change),
            parent_config=context.incumbent_config, config_hash=REGISTRY.config_hash(resolved),
            verdict="keep" if keep else "reject", reason=reason, delta_bpb=delta, same_fingerprint=True,
            previous={k: context.incumbent[k] for k in proposal.change},
        )
        self.proposals.append(proposal)
        self.history.append(trial)
        self.tried.add(trial.config_hash)
        if keep:
            self.incumbent = resolved
        return trial

    def run(self, trials: int) -> Search:
        for _ in range(trials):
            self.step()
        return self

    def without_previous(self) -> Search:
        """The same search as a harness would give it that does not record the old values."""
        self.history = [replace(t, previous={}) for t in self.history]
        return self
