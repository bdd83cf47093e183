"""History under another policy: the recorded one reproduces it, a stricter one never keeps more, limits are said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.gate.noise import noise_from_dict, pool_decided
from harness.gate.policy import Policy, PolicyError, from_dict, load_policy
from harness.gate.replay import Case, Replayed, cases, measured, replay, repooled
from harness.gate.verdict import Facts, breadth_verdict, confirm_step, early_verdict
from ledger.decode import Record
from ledger.records import (
    ControlEnded,
    Decided,
    EarlyStop,
    RunFigures,
    SearchStarted,
    StageEnded,
    TrialProposed,
    Writer,
)
from ledger.store import Ledger
from tests.harness.gate_figures import CAP, POLICY, gains, run, sides

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "ledger" / "autoresearch.jsonl"
FREE = dataclasses.replace(POLICY, price_mb=0.0, price_time=0.0)


def under(policy: Policy, found: list[Case]) -> list[Replayed]:
    return replay(found, lambda section: policy)


def history(policy: Policy, differences: list[list[float]], **changes: Any) -> list[Case]:
    """Trials judged one after the other, each against the pool of those before it, as a search does it."""
    out: list[Case] = []
    for i, d in enumerate(differences):
        decided = confirm_step(policy, *gains(d, **changes), pool_decided(policy, [c.decided for c in out]),
                               Facts(cap_bytes=CAP))
        assert decided.verdict != "continue"
        out.append(Case(search="s", trial=f"s-{i:04d}", track="tests", fingerprint="f", decided=decided))
    return out


def some(n: int, seed: int, pairs: int = 4) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [list(rng.choice([0.0, 0.006, 0.012, 0.03]) + rng.uniform(0.001, 0.006) * rng.standard_normal(pairs))
            for _ in range(n)]


@pytest.mark.skipif(not COMMITTED.is_file(), reason="no ledger in this checkout")
def test_the_recorded_policies_reproduce_the_committed_ledger() -> None:
    found = cases(Ledger(COMMITTED).records())
    own = {c.decided.policy_hash: from_dict(c.decided.policy) for c in found}
    assert found
    for policy_hash, policy in own.items():
        ours = [c for c in found if c.decided.policy_hash == policy_hash]
        rows = under(policy, ours)
        assert [r for r in rows if r.changed or r.detail] == []
        assert [(r.verdict, r.reason, r.pairs) for r in rows] == [
            (c.decided.verdict, c.decided.reason, c.decided.looks[-1].n if c.decided.looks else 0) for c in ours]
        assert {r.noise for r in rows} <= {"recorded", "none"}


@pytest.mark.skipif(not COMMITTED.is_file(), reason="no ledger in this checkout")
def test_pooling_the_committed_ledger_again_gives_the_recorded_pools() -> None:
    before: dict[tuple[str, str], list[Decided]] = {}
    for c in cases(Ledger(COMMITTED).records()):
        seen = before.setdefault((c.search, c.fingerprint), [])
        if c.decided.noise_prior:
            again, old = repooled(from_dict(c.decided.policy), c, seen), noise_from_dict(c.decided.noise_prior)
            assert again.sigma_d == pytest.approx(old.sigma_d, rel=1e-12)
            assert (again.df, again.run_df, again.trials) == (old.df, old.run_df, old.trials)
        if c.decided.stage == "confirm":
            seen.append(c.decided)


def test_the_same_policy_changes_nothing() -> None:
    found = history(FREE, some(12, seed=1))
    assert {c.decided.verdict for c in found} == {"keep", "reject"}
    rows = under(FREE, found)
    assert not any(r.changed or r.detail for r in rows) and {r.noise for r in rows} == {"recorded"}


def test_the_pool_is_made_again_under_another_prior() -> None:
    """By hand: a fresh pool from the new prior and the verdicts before, then the verdict from it."""
    other = dataclasses.replace(FREE, prior=dataclasses.replace(FREE.prior, sigma_d=0.02, sigma_run=0.03))
    found = history(FREE, some(10, seed=2))
    rows = under(other, found)
    assert {r.noise for r in rows} == {"re-pooled"}
    for i, (case, row) in enumerate(zip(found, rows, strict=True)):
        noise = pool_decided(other, [c.decided for c in found[:i]])
        want = confirm_step(other, case.decided.control, case.decided.candidate, noise, Facts(cap_bytes=CAP))
        if want.verdict == "continue":
            assert (row.verdict, row.reason) == ("undecided", "")
        else:
            assert (row.verdict, row.reason) == (want.verdict, want.reason)
    assert sum(r.verdict == "keep" for r in rows) < sum(c.decided.verdict == "keep" for c in found)


def test_pools_do_not_mix_fingerprints_or_searches() -> None:
    other = dataclasses.replace(FREE, pool_clip=3.0)
    found = history(FREE, some(6, seed=3))
    apart = [dataclasses.replace(c, fingerprint=f"f{i}") for i, c in enumerate(found)]
    alone = [replay([c], lambda section: other)[0] for c in found]
    assert under(other, apart) == alone
    assert under(other, [dataclasses.replace(c, search=f"s{i}") for i, c in enumerate(found)]) == [
        dataclasses.replace(r, search=f"s{i}") for i, r in enumerate(alone)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 1.0), st.floats(0.0, 0.01), st.sampled_from(["alpha", "materiality"]))
def test_a_stricter_policy_never_keeps_more(seed: int, factor: float, more: float, what: str) -> None:
    found = history(FREE, some(6, seed))
    strict = (dataclasses.replace(FREE, alpha=FREE.alpha * factor) if what == "alpha"
              else dataclasses.replace(FREE, materiality_bpb=FREE.materiality_bpb + more))
    for case, row in zip(found, under(strict, found), strict=True):
        assert case.decided.verdict == "keep" or row.verdict != "keep"


def test_missing_pairs_are_counted() -> None:
    found = history(FREE, [[0.0, 0.0005], [0.05, 0.051, 0.052, 0.049]])
    assert found[0].decided.looks[-1].n == 2
    patient = dataclasses.replace(FREE, looks=(4, 8), futility_power=0.0)
    first, second = under(patient, found)
    assert (first.verdict, first.detail) == ("undecided", "needs 2 more pairs (has 2, the next look is at 4)")
    assert (second.verdict, second.reason, second.pairs) == ("keep", "kept.gain", 4)
    (last,) = under(dataclasses.replace(FREE, looks=(5,)), found[1:])
    assert last.detail == "needs 1 more pair (has 4, the next look is at 5)" and last.changed


def test_runs_that_were_made_ahead_are_used() -> None:
    found = history(FREE, [[0.05, 0.051, 0.052, 0.049]])
    used = found[0].decided.looks[-1].n
    (row,) = under(dataclasses.replace(FREE, looks=(4,)), found)
    assert used < 4 and (row.verdict, row.pairs) == ("keep", 4)
    assert row.detail == f"decided at 4 pairs, recorded at {used}" and not row.changed


def test_timing_that_was_not_measured_is_named_and_only_conditions_a_keep() -> None:
    found = history(FREE, [[0.05, 0.051, 0.052, 0.049], [0.0, 0.0005]])
    keep, reject = under(dataclasses.replace(FREE, timing_pairs=3), found)
    assert keep.verdict == "keep" and keep.detail.startswith("needs 3 more timing pairs") and not keep.changed
    assert reject.detail == "" and not reject.changed


def test_breadth_is_judged_again_from_its_own_runs() -> None:
    noise = pool_decided(FREE, [])
    bad = sides([3.0, 3.0], [3.02, 3.021])
    veto = breadth_verdict(FREE, *bad, noise).decided
    assert veto is not None
    vetoed = Case(search="s", trial="s-1", track="tests", fingerprint="f", decided=veto)
    assert not under(FREE, [vetoed])[0].changed
    lenient = dataclasses.replace(FREE, breadth_veto_sigmas=20.0)
    (row,) = under(lenient, [vetoed])
    assert (row.verdict, row.detail) == ("undecided", "breadth promotes it: needs 2 confirm pairs")
    (row,) = under(dataclasses.replace(FREE, breadth_pairs=3), [vetoed])
    assert (row.verdict, row.detail) == ("undecided", "needs 1 more breadth pair")
    # and a trial that went on to confirm is vetoed where the other policy would have vetoed it
    slightly = sides([3.0, 3.0], [3.001, 3.0012])
    (kept,) = history(FREE, [[0.05, 0.051, 0.052, 0.049]])
    kept = dataclasses.replace(kept, breadth_control=tuple(slightly[0]), breadth_candidate=tuple(slightly[1]))
    assert not under(FREE, [kept])[0].changed
    (row,) = under(dataclasses.replace(FREE, breadth_veto_sigmas=0.0), [kept])
    assert (row.verdict, row.reason, row.pairs) == ("reject", "rejected.worse", 0) and "vetoed at breadth" in row.detail
    (row,) = under(dataclasses.replace(FREE, breadth_pairs=4), [kept])
    assert (row.verdict, row.detail) == ("keep", "needs 2 more breadth pairs")


def test_an_early_stop_is_judged_again() -> None:
    stops = dataclasses.replace(FREE, early_fractions=(0.5,), early_nats=(0.1,))
    control = run(0, 3.0, "c", dev=[[60.0, 4.0]])
    stop = EarlyStop(k=0, seed=1000, step=60, of=120, control=4.0, candidate=4.2, threshold=0.1)
    decided = early_verdict(stops, [control], stop, pool_decided(stops, []))
    assert decided is not None
    case = Case(search="s", trial="s-1", track="tests", fingerprint="f", decided=decided)
    assert not under(stops, [case])[0].changed
    (row,) = under(dataclasses.replace(stops, early_nats=(0.3,)), [case])
    assert row.verdict == "undecided"
    assert row.detail == "not given up at step 60 of 120: needs its breadth runs finished"


def test_what_cannot_be_judged_says_why() -> None:
    (case,) = history(FREE, [[0.05, 0.051, 0.052, 0.049]])
    unpaired = dataclasses.replace(FREE, min_correlation=1.0, controls=9)
    (row,) = under(unpaired, [case])
    assert row.verdict == "undecided" and "cannot be judged" in row.detail and "9" in row.detail


def test_a_preflight_verdict_stays() -> None:
    decided = Decided(verdict="reject", reason="rejected.bytes", explanation="", policy_hash=FREE.hash,
                      policy=FREE.to_dict(), stage="preflight")
    (row,) = under(FREE, [Case(search="s", trial="s-1", track="t", fingerprint="f", decided=decided)])
    assert not row.changed and row.noise == "none"


def test_a_bad_policy_file_is_passed_on() -> None:
    found = history(FREE, [[0.05, 0.051, 0.052, 0.049]])
    with pytest.raises(PolicyError):
        replay(found, lambda section: load_policy(section, Path("nothere.toml")))


def record(seq: int, kind: str, body: msgspec.Struct, trial: str = "", search: str = "s") -> Record:
    return Record(v=1, seq=seq, id=str(seq), type=kind, ts="", writer=Writer("", 0, ""), search=search, trial=trial,
                  body=body, prev="", h="")  # type: ignore[arg-type]


def test_cases_gather_breadth_runs_track_and_fingerprint_of_each_trial() -> None:
    (one,) = history(FREE, [[0.05, 0.051, 0.052, 0.049]])
    started = SearchStarted(track="pocket-2x", fingerprint="f", fingerprint_parts={}, policy_hash="", agent="", seed=1,
                            branch="", incumbent_commit="", incumbent_config="base", code_tree="")

    def proposed(fingerprint: str) -> TrialProposed:
        return msgspec.convert({
            "number": 1, "kind": "knobs", "agent": "", "line": "", "hypothesis": "", "change": {}, "previous": {},
            "predicted": {}, "falsified_by": "", "pages": [], "records": [], "config_hash": "x", "proposal_hash": "",
            "parent_commit": "", "parent_config": "base", "generation": 0, "fingerprint": fingerprint}, TrialProposed)

    def control(k: int, config: str = "base") -> ControlEnded:
        return ControlEnded(stage="breadth", generation=0, incumbent_commit="", config_hash=config, fingerprint="f",
                            run=run(k, 3.0, "c"))

    def short(k: int) -> RunFigures:
        return run(k, 2.9)

    records = [
        record(0, "search.started", started), record(1, "control.ended", control(0)),
        record(2, "control.ended", control(1, "another")), record(3, "trial.proposed", proposed("f"), "s-1"),
        record(4, "breadth.ended", StageEnded(run=short(0)), "s-1"),
        record(5, "breadth.ended", StageEnded(run=short(1)), "s-1"),
        record(6, "confirm.ended", StageEnded(run=short(2)), "s-1"), record(7, "decided", one.decided, "s-1"),
        record(8, "trial.proposed", proposed("elsewhere"), "s-2"), record(9, "decided", one.decided, "s-2"),
    ]
    first, second = cases(records)
    assert (first.track, first.fingerprint, first.trial) == ("pocket-2x", "f", "s-1")
    assert [r.k for r in first.breadth_control] == [r.k for r in first.breadth_candidate] == [0]
    assert first.breadth_candidate[0].val_bpb == 2.9
    assert (second.track, second.breadth_candidate) == ("tests", ())
    assert measured(records, "pocket-2x") == ([one.decided], None)
    assert measured(records, "pocket") == ([], None)
