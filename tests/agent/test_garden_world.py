"""The garden against an independent random proposer in worlds whose truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest

from agent.contract import Context, Exhausted, Proposal
from agent.proposers import Garden
from tests.agent.support import KB, line_block, write_kb
from tests.agent.world import Propose, Search, World
from trainer.knobs import REGISTRY, KnobError, KnobValue

MOVABLE = sorted(k.name for k in REGISTRY if k.ladder)


def uniform(context: Context) -> Proposal:
    """The baseline: any searchable knob, any rung, uniformly, until it is valid and new."""
    rng = random.Random(context.seed * 1_000_003 + context.number)
    for _ in range(10_000):
        name = rng.choice(MOVABLE)
        change = {name: rng.choice(REGISTRY.get(name).ladder)}
        try:
            judged = REGISTRY.config_hash(REGISTRY.resolve(context.incumbent, change))
        except KnobError:
            continue
        if name not in context.locked and judged not in context.tried_configs:
            return Proposal(line="manual", hypothesis="any", change=change)
    raise Exhausted



def world(knob: str, best: float) -> World:
    """val_bpb falls towards ``best`` of one knob (0.03 per factor of two); everything else does nothing."""

    def truth(knobs: Mapping[str, KnobValue]) -> float:
        return 2.5 + 0.03 * abs(math.log2(max(float(knobs[knob]), 1e-3) / best))
    return truth


def reached(propose: Propose, knob: str, best: float, seeds: range, trials: int) -> float:
    """Mean share of the possible gain that searches reach."""
    total = 0.0
    for seed in seeds:
        search = Search(propose, world(knob, best), seed)
        start = search.world(search.incumbent)
        search.run(trials)
        total += (start - search.world(search.incumbent)) / (start - 2.5)
    return total / len(seeds)


@pytest.mark.parametrize(("knob", "best"), [("warmdown_frac", 0.5), ("matrix_lr", 0.015), ("qk_gain_init", 5.0)])
def test_the_garden_climbs_one_true_hill_faster_than_chance(knob: str, best: float) -> None:
    garden = Garden(KB)
    ours = reached(garden.propose, knob, best, range(12), 25)
    chance = reached(uniform, knob, best, range(12), 25)
    assert ours > chance + 0.1, (ours, chance)


def test_it_climbs_on_its_own_outcomes_when_the_knowledge_base_is_neutral(tmp_path) -> None:
    """All lines alike, no direction given: what the verdicts teach must be enough to beat chance."""
    names = [n for n in MOVABLE if isinstance(REGISTRY.get(n).default, float)]
    blocks = [line_block(f'ladder = "{n}"\nspacing = "log"', name=n) for n in names]
    garden = Garden(write_kb(tmp_path, blocks))
    ours = reached(garden.propose, "matrix_lr", 0.012, range(24), 40)
    chance = reached(uniform, "matrix_lr", 0.012, range(24), 40)
    assert ours > chance + 0.05, (ours, chance)


def test_a_line_that_wins_is_chosen_more_often_afterwards(tmp_path) -> None:
    names = ("matrix_lr", "beta2", "qk_gain_init")
    blocks = [line_block(f'ladder = "{n}"\nspacing = "log"', name=n) for n in names]
    garden = Garden(write_kb(tmp_path, blocks))
    first = sum(
        Search(garden.propose, world("matrix_lr", 0.005), s).run(1).history[0].line == "matrix_lr" for s in range(60)
    )
    third = 0
    for seed in range(60):
        search = Search(garden.propose, world("matrix_lr", 0.005), seed)
        while not any(t.verdict == "keep" for t in search.history):
            search.step()
        third += search.step().line == "matrix_lr"
    assert third > first
