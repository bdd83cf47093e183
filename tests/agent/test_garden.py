"""Laws of the garden over random histories: valid, new, never locked, deterministic, well explained."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract import Context, Exhausted
from agent.knowledge import Move, load
from agent.proposers import Garden, ProposerError, make_proposer
from agent.proposers._history import near_misses, outcome, posterior, trend
from agent.proposers._moves import candidates, midpoint
from tests.agent.support import KB, LOCKED, context, line_block, past, write_kb
from tests.agent.world import Search
from trainer.knobs import REGISTRY

GARDEN = Garden(KB)
KNOWLEDGE = load(KB)
OUTCOMES = (
    ("keep", "kept.gain", -0.02), ("reject", "rejected.worse", 0.02), ("reject", "rejected.noise", -0.001),
    ("reject", "rejected.noise", 0.001), ("reject", "rejected.immaterial", -0.002),
    ("reject", "rejected.bytes", None), ("failed", "failed.crash", None), ("refused", "rejected.duplicate", None),
)


def check(proposal_context: Context) -> None:
    """Everything a proposal owes to its context."""
    proposal = GARDEN.propose(proposal_context)
    resolved = REGISTRY.resolve(proposal_context.incumbent, proposal.change)  # raises if invalid
    assert REGISTRY.config_hash(resolved) not in proposal_context.tried_configs
    assert proposal.change and not set(proposal.change) & proposal_context.locked
    assert all(proposal_context.incumbent[k] != v for k, v in proposal.change.items())
    assert proposal.line in KNOWLEDGE.lines and KNOWLEDGE.lines[proposal.line].status == "active"
    assert proposal.pages == (KNOWLEDGE.cite(proposal.line),)
    known = set(KNOWLEDGE.evidence) | {t.trial for t in proposal_context.history}
    assert set(proposal.records) <= known
    assert set(proposal.predicted) == {"val_bpb", "bytes", "step_time"}
    assert all(name in proposal.hypothesis for name in proposal.change) and "->" in proposal.hypothesis
    assert re.search(r"\d\.\d{3}", proposal.falsified_by)
    assert proposal == GARDEN.propose(proposal_context) == Garden(KB).propose(proposal_context)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.sampled_from(OUTCOMES), max_size=12))
def test_every_proposal_of_a_random_search_keeps_the_laws(seed: int, outcomes: list) -> None:
    """A search whose verdicts are arbitrary, each trial being what the garden itself proposed."""
    now = context(seed=seed)
    for number, (verdict, reason, delta) in enumerate(outcomes, start=1):
        check(now)
        proposal = GARDEN.propose(now)
        resolved = REGISTRY.resolve(now.incumbent, proposal.change)
        judged = REGISTRY.config_hash(resolved)
        trial = past(
            f"t{number}", proposal.line, proposal.change, verdict, reason, delta, move=proposal.move,
            previous={k: now.incumbent[k] for k in proposal.change} if number % 2 else {},
        )
        kept = verdict == "keep"
        now = dataclasses.replace(
            now, number=number + 1, history=(*now.history, trial), tried_configs=now.tried_configs | {judged},
            incumbent=resolved if kept else now.incumbent, incumbent_config=judged if kept else now.incumbent_config,
        )
    check(now)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.sampled_from([k.name for k in REGISTRY if k.ladder]), st.integers(0, 9),
                       st.sampled_from(OUTCOMES), st.booleans()), max_size=15),
    st.frozensets(st.sampled_from([k.name for k in REGISTRY if k.ladder]), max_size=20),
)
def test_histories_of_other_origin_are_taken_too(seed: int, rows: list, locked: frozenset[str]) -> None:
    """Manual trials, foreign fingerprints, knobs that no line knows, more knobs locked than usual."""
    history = []
    for i, (name, rung, (verdict, reason, delta), same) in enumerate(rows):
        ladder = REGISTRY.get(name).ladder
        history.append(past(f"t{i}", "manual", {name: ladder[rung % len(ladder)]}, verdict, reason, delta, same=same))
    now = context(seed=seed, number=len(history) + 1, history=history, locked=LOCKED | locked)
    try:
        check(now)
    except Exhausted:
        movable = {n for line in KNOWLEDGE.active() for m in line.moves for n in m.names}
        assert movable - now.locked <= {"num_layers", "model_dim", "mlp_mult"}


def test_different_seeds_and_numbers_explore_differently() -> None:
    first = {tuple(GARDEN.propose(context(seed=s)).change.items()) for s in range(60)}
    later = {tuple(GARDEN.propose(context(number=n)).change.items()) for n in range(1, 60)}
    assert len(first) >= 8 and len(later) >= 8


def test_a_search_that_never_wins_ends_in_exhausted_without_repeating() -> None:
    search = Search(GARDEN.propose, lambda knobs: 2.5, seed=3)
    with pytest.raises(Exhausted, match="no line of the knowledge base has a valid, untried step left on pocket"):
        search.run(2000)
    hashes = [t.config_hash for t in search.history]
    assert len(hashes) == len(set(hashes)) > 40


@given(st.floats(0.05, 0.95), st.lists(st.sampled_from(OUTCOMES), max_size=20))
def test_the_posterior_moves_the_right_way(mean: float, outcomes: list) -> None:
    prior = (mean * 6, (1 - mean) * 6)
    belief = prior
    for i, (verdict, reason, delta) in enumerate(outcomes):
        trial = past(f"t{i}", "schedule", {"warmdown_frac": 0.5}, verdict, reason, delta)
        after = posterior(belief, "schedule", [trial])
        before_mean, after_mean = belief[0] / sum(belief), after[0] / sum(after)
        assert after_mean > before_mean if verdict == "keep" else after_mean <= before_mean
        assert posterior(belief, "averaging", [trial]) == belief
        belief = after


def test_a_loss_weighs_more_than_noise_and_noise_more_than_a_crash() -> None:
    def failure(verdict: str, reason: str, *, same: bool = True) -> float:
        return outcome(past("t", "schedule", {"beta2": 0.99}, verdict, reason, None, same=same))[1]

    weights = [
        failure("reject", "rejected.worse"), failure("reject", "rejected.noise"), failure("failed", "failed.crash"),
        failure("failed", "failed.infra"),
    ]
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 4 and weights[-1] == 0
    assert failure("reject", "rejected.worse", same=False) < failure("reject", "rejected.worse")


def move(line: str, kind: str, index: int = 0) -> Move:
    return [m for m in KNOWLEDGE.lines[line].moves if m.kind == kind][index]


def ladder_weights(now: Context) -> dict[float, float]:
    """value -> weight of the matrix_lr ladder's candidates."""
    return {float(c.change["matrix_lr"]): c.weight for c in candidates(move("learning_rates", "ladder"), now)}


def test_the_ladder_steps_one_rung_where_the_evidence_points() -> None:
    assert set(ladder_weights(context())) == {0.03}
    undirected = candidates(move("learning_rates", "ladder", 2), context())
    assert {c.change["scalar_lr"] for c in undirected} == {0.035, 0.06}


def test_after_a_keep_the_next_rung_goes_on_and_brackets_open() -> None:
    kept = past("t1", "learning_rates", {"matrix_lr": 0.02}, "keep", "kept.gain", -0.02, previous={"matrix_lr": 0.04})
    now = context(change={"matrix_lr": 0.02}, history=[kept], number=2)
    weights = ladder_weights(now)
    (between,) = set(weights) - {0.015}
    assert weights[0.015] > weights[between] and 0.02 < between < 0.04
    onward = next(c for c in candidates(move("learning_rates", "ladder"), now) if c.change["matrix_lr"] == 0.015)
    assert onward.bpb == pytest.approx(-0.01) and "t1" in onward.records


def test_a_rung_measured_worse_turns_the_ladder_and_bounds_the_bracket() -> None:
    up = past("t1", "learning_rates", {"matrix_lr": 0.06}, "keep", "kept.gain", -0.02, previous={"matrix_lr": 0.04})
    over = past("t2", "learning_rates", {"matrix_lr": 0.1}, previous={"matrix_lr": 0.06})
    now = context(change={"matrix_lr": 0.06}, history=[up, over], number=3)
    brackets = [c for c in candidates(move("learning_rates", "ladder"), now) if c.kind == "bracket"]
    below, above = sorted(float(c.change["matrix_lr"]) for c in brackets)
    assert 0.04 < below < 0.06 < above < 0.1
    worse = past("t1", "learning_rates", {"matrix_lr": 0.03}, previous={"matrix_lr": 0.04})
    turned = context(history=[worse], number=2)
    assert set(ladder_weights(turned)) == {0.06}
    (other,) = candidates(move("learning_rates", "ladder"), turned)
    assert other.against and 0 > other.bpb > move("learning_rates", "ladder").bpb


def test_trends_need_no_recorded_previous_value() -> None:
    search = Search(GARDEN.propose, lambda k: 2.5 + abs(float(k["matrix_lr"]) - 0.015), seed=5).run(25)
    told = search.context()
    untold = search.without_previous().context()
    for knob in ("matrix_lr", "beta2"):
        assert trend(told, knob).winner == trend(told, knob).winner
        a, b = trend(told, knob), trend(untold, knob)
        assert [p.new for p in a.around] == [p.new for p in b.around]


def test_near_misses_combine_when_they_touch_different_knobs() -> None:
    history = [
        past("t1", "gates", {"smear_gate": True}, "reject", "rejected.noise", -0.002),
        past("t2", "activation", {"mlp_neg_slope": 0.5}, "reject", "rejected.immaterial", -0.003),
        past("t3", "gates", {"attn_out_gate": True}, "reject", "rejected.noise", 0.001),
        past("t4", "gates", {"smear_gate": True, "attn_out_gate": True}, "reject", "rejected.noise", -0.001),
        past("t5", "activation", {"resid_norm": True}, "reject", "rejected.worse", -0.1),
        past("t6", "activation", {"muon_wd": 0.04}, "reject", "rejected.noise", -0.004, same=False),
    ]
    now = context(history=history, number=7)
    assert [t.trial for t in near_misses(now)] == ["t2", "t1", "t4"]
    pairs = {c.records for c in candidates(move("combination", "combine"), now)}
    assert pairs == {("t2", "t1"), ("t2", "t4")}
    best = next(c for c in candidates(move("combination", "combine"), now) if c.records == ("t2", "t1"))
    assert dict(best.change) == {"mlp_neg_slope": 0.5, "smear_gate": True}
    assert best.bpb == pytest.approx(-0.0025)  # half of the sum: both were selected


def test_simplification_waits_until_a_technique_is_settled() -> None:
    steps = [("t1", {"resid_norm": True}), ("t2", {"matrix_lr": 0.02}), ("t3", {"beta2": 0.99}),
             ("t4", {"warmdown_frac": 0.5})]
    history = [past(t, "schedule", c, "keep", "kept.gain", -0.01) for t, c in steps]
    change = {k: v for _, c in steps for k, v in c.items()}
    early = context(change={k: v for k, v in change.items() if k != "warmdown_frac"}, history=history[:3], number=4)
    late = context(change=change, history=history, number=5)
    simplify = move("simplification", "simplify")
    assert list(candidates(simplify, early)) == []
    assert [(dict(c.change), c.records) for c in candidates(simplify, late)] == [({"resid_norm": False}, ("t1",))]


def test_a_shape_over_the_cap_is_never_proposed() -> None:
    for seed in range(40):
        now = context(seed=seed, incumbent_bytes=699_000, cap_bytes=700_000)
        proposal = GARDEN.propose(now)
        assert proposal.predicted["bytes"] <= 1000


@pytest.mark.parametrize(("a", "b", "spacing", "want"), [
    (0.04, 0.01, "log", 0.02), (0.1, 0.3, "linear", 0.2), (0.9, 0.99, "one-minus-log", 0.968),
    (0.04, 0.041, "log", None), (0.0, 0.1, "log", 0.05),
])
def test_midpoints(a: float, b: float, spacing: str, want: float | None) -> None:
    assert midpoint(a, b, spacing, REGISTRY.get("matrix_lr")) == want
    assert midpoint(b, a, spacing, REGISTRY.get("matrix_lr")) == want


def test_whole_numbers_stay_whole() -> None:
    assert midpoint(3, 6, "linear", REGISTRY.get("muon_backend_steps")) == 4
    assert midpoint(4, 5, "linear", REGISTRY.get("muon_backend_steps")) is None


def test_an_idle_base_is_exhausted_with_advice(tmp_path) -> None:
    garden = Garden(write_kb(tmp_path, [line_block("combine = true")]))
    with pytest.raises(Exhausted, match="add a line or a knob"):
        garden.propose(context())


def test_proposers_by_name() -> None:
    assert make_proposer("garden", KB).name == "garden"
    for name, words in (("llm", "not there yet"), ("optuna", "not there yet"), ("rose", "valid: garden")):
        with pytest.raises(ProposerError, match=words):
            make_proposer(name, KB)
