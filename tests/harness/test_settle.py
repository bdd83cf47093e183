"""After a keep: fresh seeds, the honest gain, and taking back what is not there; and what else the loop measures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from msgspec import structs

import harness.search as search_module
from agent.contract import Proposal
from harness.audit import checks, honesty, measured
from harness.errors import UserError
from harness.executor import RunRequest
from harness.gate.policy import Policy, load_policy
from harness.gitrepo import Repo
from harness.search import SearchOptions, run_search
from harness.state import SearchState, TrialState
from harness.workspace import Workspace
from ledger.queries import best, lineage
from ledger.store import Ledger
from ledger.verify import verify
from tests.conftest import git
from tests.harness.fakes import FakeExecutor, Killed, SilentView, unit
from tests.harness.test_loop import arm, fake_world, read, wound, ws  # noqa: F401 - fixtures

TRACK = "nano"
MINE = {"matrix_lr": 0.015}


def policy(monkeypatch: pytest.MonkeyPatch, **change: Any) -> Policy:
    """The test track's policy with ``change``, for every search of this test."""
    made = dataclasses.replace(load_policy(TRACK), **change)
    monkeypatch.setattr(search_module, "load_policy", lambda name: made)
    return made


def world(gain: dict[int, float], spread: float = 0.0) -> None:
    """val_bpb whose edit gains ``gain[generation of the seeds]``, with ``spread`` of luck per seed."""
    def score(request: RunRequest) -> float:
        generation = int(request.run_id.split("-g")[-1].split("-")[0])
        mine = request.knobs["matrix_lr"] == MINE["matrix_lr"]
        own = gain.get(generation, 0.0) + spread * unit(request.seed) if mine else 0.0
        return 2.4 + 0.02 * unit("seed", request.seed) - own

    FakeExecutor.world = staticmethod(score)


def attempt(ws: Workspace, change: dict[str, Any] | None = None) -> tuple[SearchState, TrialState]:  # noqa: F811
    proposal = Proposal(line="manual", hypothesis="h", change=change or MINE, move="manual")
    run_search(ws, SearchOptions(track=TRACK), SilentView(), proposal, FakeExecutor)
    state = read(ws)
    return state, list(state.trials.values())[-1]


def recipe(ws: Workspace) -> str:  # noqa: F811
    return git(ws.root, "show", f"search/{TRACK}:trainer/recipes/{TRACK}.toml")


def verified(ws: Workspace) -> None:  # noqa: F811
    report = verify(ws.ledger, checks(Repo(ws.root), ws.ledger))
    assert report.ok, report


def test_a_true_gain_stands_with_an_honest_figure(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    policy(monkeypatch, honest_pairs=4)
    world({0: 0.03, 1: 0.02}, spread=0.004)
    state, trial = attempt(ws)
    assert trial.stands and trial.honest and trial.honest.decision == "stand"
    sides = [state.controls[("confirm", 1, config, trial.proposed.fingerprint)]
             for config in (trial.proposed.parent_config, trial.proposed.config_hash)]
    differences = [sides[0][k].val_bpb - sides[1][k].val_bpb for k in range(4)]
    assert trial.honest.gain == pytest.approx(fmean(differences))
    assert trial.honest.se == pytest.approx(stdev(differences) / math.sqrt(4))
    assert trial.honest.gain < trial.honest.claimed
    seeds = {r.seed for r in trial.runs["confirm"].values()} | {r.seed for r in trial.runs["breadth"].values()}
    assert not seeds & {r.seed for side in sides for r in side.values()}, "fresh seeds"
    assert "matrix_lr = 0.015" in recipe(ws)
    verified(ws)
    (leader,) = best(Ledger(ws.ledger).records())
    assert leader.paired_gain == pytest.approx(trial.honest.gain)


def test_a_gain_that_is_not_there_on_fresh_seeds_is_taken_back(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, honest_pairs=2, honest_extend=2)
    world({0: 0.03, 1: -0.001}, spread=0.0005)
    before = git(ws.root, "rev-parse", "main^{tree}")
    state, trial = attempt(ws)
    assert trial.reverted and not trial.stands and trial.verdict == "reject" and trial.reason == "reverted.honest"
    assert trial.honest and len(trial.honest.ks) == 4, "two seeds more were asked before it was taken back"
    assert git(ws.root, "rev-parse", f"search/{TRACK}") == trial.reverted.sha
    assert git(ws.root, "rev-parse", f"search/{TRACK}^{{tree}}") == before, "everything is as it was"
    assert git(ws.root, "log", "-1", "--format=%(trailers:key=Reverts-Trial,valueonly)", trial.reverted.sha) == trial.id
    assert (state.generation, state.standing) == (1, [])
    verified(ws)
    (root,) = lineage(Ledger(ws.ledger).records())
    assert root.children == [] and [a.status for a in root.attempts] == ["reverted"]
    # the parent is the incumbent again, its fresh runs are its bank, and the edit is not proposed a second time
    calls = len(FakeExecutor.calls)
    _, again = attempt(ws)
    assert again.reason == "rejected.duplicate" and len(FakeExecutor.calls) == calls
    _, other = attempt(ws, {"matrix_lr": 0.02})
    assert other.proposed.parent_commit == trial.reverted.sha
    assert other.proposed.parent_config == trial.proposed.parent_config
    (root,) = lineage(Ledger(ws.ledger).records())
    assert [a.trial for a in root.attempts][-1] == other.id
    verified(ws)


def test_a_weak_first_word_is_asked_again_and_may_stand(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, honest_pairs=2, honest_extend=2)
    order: list[int] = []

    def score(request: RunRequest) -> float:
        mine = request.knobs["matrix_lr"] == MINE["matrix_lr"]
        if "-g1-" not in request.run_id:
            return 2.4 - 0.03 * mine
        order.append(request.k)
        return 2.4 - (0.01 if request.k >= 2 else -0.001) * mine

    FakeExecutor.world = staticmethod(score)
    _, trial = attempt(ws)
    assert trial.honest and trial.honest.decision == "stand" and trial.stands
    words = [getattr(r.body, "decision", "") for r in Ledger(ws.ledger).records(types=["honest.measured"])]
    assert words == ["extend", "stand"]
    verified(ws)


@pytest.mark.parametrize("point", ["after:honest.measured", "before:revert", "after:control.ended"])
def test_killed_while_it_is_settled(
    ws: Workspace, point: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, honest_pairs=2, honest_extend=1)
    world({0: 0.03, 1: -0.001})
    arm(monkeypatch, point)
    ended = run_to_the_end(ws)
    assert ended.trials["nano-0001"].reverted and len(ended.trials) == 1
    types = [r.type for r in Ledger(ws.ledger).records(trial="nano-0001")]
    assert types.count("revert.intent") == types.count("trial.reverted") == 1
    verified(ws)


@pytest.mark.parametrize("step", ["build_tree", "build_commit", "pin", "swap", "bring_along"])
@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_step_of_the_revert(
    ws: Workspace, step: str, before: bool, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, honest_pairs=2)
    world({0: 0.03, 1: -0.001})
    original, armed = search_module.take_back, [True]

    def take_back(*args: Any) -> None:
        if armed[0]:
            armed[0] = False
            wound(monkeypatch, step, before)
        original(*args)

    monkeypatch.setattr(search_module, "take_back", take_back)
    git(ws.root, "branch", f"search/{TRACK}")
    git(ws.root, "checkout", "-q", f"search/{TRACK}")
    ended = run_to_the_end(ws)
    assert not armed[0]
    assert ended.trials["nano-0001"].reverted
    assert git(ws.root, "status", "--porcelain", "--untracked-files=no") in ("", "M ledger/autoresearch.jsonl")
    assert git(ws.root, "rev-parse", f"search/{TRACK}^{{tree}}") == git(ws.root, "rev-parse", "main^{tree}")
    verified(ws)


def run_to_the_end(ws: Workspace) -> SearchState:  # noqa: F811
    """Start again after every kill: first the person's proposal, then without one (it is in the ledger)."""
    proposal = Proposal(line="manual", hypothesis="h", change=MINE, move="manual")
    for _ in range(50):
        try:
            trials = read(ws).trials if ws.ledger.exists() else {}
            done = trials and next(iter(trials.values())).over
            options = SearchOptions(track=TRACK, trials=1) if done else SearchOptions(track=TRACK)
            run_search(ws, options, SilentView(), None if trials else proposal, FakeExecutor)
            state = read(ws)
            if state.trials and not any(t.owes_commit or t.owes_revert or not t.over for t in state.trials.values()):
                return state
        except Killed:
            continue
    pytest.fail("it never came to its end")


# Step times.


def test_a_keep_rests_on_step_times_that_took_turns(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, timing_pairs=3)
    world({0: 0.03, 1: 0.03})
    _, trial = attempt(ws)
    assert trial.decided and trial.decided.reason == "kept.gain" and len(trial.decided.timing) == 3
    short = [r for r in FakeExecutor.calls if r.stage in ("preflight", "timing")]
    assert [r.owner.endswith("-incumbent") for r in short] == [False, True, False, True, True, False]
    assert {r.knobs["iterations"] for r in short} == {search_module.get_track(TRACK).timing_steps}
    verified(ws)


def test_a_rejection_needs_no_more_step_times(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    policy(monkeypatch, timing_pairs=3)
    world({0: -0.03})
    _, trial = attempt(ws)
    assert trial.decided and trial.decided.verdict == "reject" and len(trial.timing) == 1


# The bank.


def test_idle_workers_grow_the_bank_and_trials_take_its_blocks_in_turn(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    from agent.proposers.garden import Garden

    made = policy(monkeypatch, bank_max=4, honest_pairs=0)
    world({})
    monkeypatch.setattr(Garden, "slow", True)
    run_search(ws, SearchOptions(track=TRACK, trials=6), SilentView(), None, FakeExecutor)
    state = read(ws)
    (config,) = {key[2] for key in state.controls if key[0] == "confirm"}
    bank = next(runs for key, runs in state.controls.items() if key[0] == "confirm" and key[2] == config)
    assert sorted(bank) == [0, 1, 2, 3]
    used = {min(t.runs["confirm"]) for t in state.trials.values() if t.runs["confirm"]}
    assert used == {0, made.max_pairs}, "both blocks of two are used"
    verified(ws)


def test_no_run_is_made_twice_at_once(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """An odd number of controls leaves a worker idle beside the last one: it must not be given that very run."""
    policy(monkeypatch, bank_max=6, controls=3, honest_pairs=0)
    world({})
    alive: set[str] = set()
    original = FakeExecutor.submit

    def submit(self: FakeExecutor, request: RunRequest, sink: Any) -> Any:
        assert request.run_id not in alive, request.run_id
        alive.add(request.run_id)
        return original(self, request, sink)

    def over(self: Any, request: RunRequest) -> None:
        alive.discard(request.run_id)

    monkeypatch.setattr(FakeExecutor, "submit", submit)
    monkeypatch.setattr(SilentView, "run_over", over)
    run_search(ws, SearchOptions(track=TRACK, trials=5), SilentView(), None, FakeExecutor)
    ids = [r.run_id for r in FakeExecutor.calls if r.owner.startswith("control-") and r.stage == "confirm"]
    assert len(ids) == len(set(ids)) == 6


# Predictions of bytes.


def test_the_error_of_the_byte_prediction_is_on_record(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, honest_pairs=0)
    world({0: 0.03})
    _, trial = attempt(ws)
    assert trial.finding and trial.preflight
    assert trial.finding.predicted_bytes == trial.preflight.predicted_bytes > 0
    assert trial.finding.measured_bytes == max(r.artifact_bytes + r.code_bytes for r in trial.runs["confirm"].values())


# Breadth, given up early.


def test_a_hopeless_breadth_run_is_given_up_and_its_sister_too(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:
    made = policy(monkeypatch, breadth_pairs=2, early_fractions=(0.34, 0.67), early_nats=(0.5, 0.2))
    world({})
    FakeExecutor.dev = staticmethod(lambda r: [[1, 6.9], [2, 6.0 + (0.3 if r.knobs["matrix_lr"] == 0.015 else 0.0)]])
    _, trial = attempt(ws)
    assert trial.decided and (trial.decided.stage, trial.decided.reason) == ("breadth", "rejected.worse")
    early = trial.decided.early
    assert early and (early.step, early.control, early.candidate, early.threshold) == (2, 6.0, 6.3, 0.2)
    assert not trial.runs["breadth"] and not trial.runs["confirm"]
    assert made.early_nats == (0.5, 0.2)
    verified(ws)


def test_early_stopping_never_helps_a_candidate(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, breadth_pairs=2, early_fractions=(0.67,), early_nats=(0.2,))
    world({0: -0.5})
    FakeExecutor.dev = staticmethod(lambda r: [[2, 0.01 if r.knobs["matrix_lr"] == 0.015 else 6.0]])
    _, trial = attempt(ws)
    assert trial.decided and trial.decided.verdict == "reject" and trial.decided.early is None


# What a reviewer broke.


def times(control: float, candidate: float, first: float | None = None) -> None:
    """Step times of short runs; ``first``: the candidate's in preflight."""
    def step(request: RunRequest) -> float:
        if request.owner.endswith("-incumbent") or request.owner.startswith("control"):
            return control
        return first if first is not None and request.stage == "preflight" else candidate

    FakeExecutor.step_ms = staticmethod(step)


def test_a_faster_candidate_is_timed_and_kept(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    policy(monkeypatch, timing_pairs=3, faster_pct=15.0, noninferiority_bpb=0.01, looks=(2, 4), honest_pairs=0,
           time_deadband_pct=10.0)
    world({0: 0.0})
    times(10.0, 7.0)
    _, trial = attempt(ws)
    assert trial.decided and trial.decided.reason == "kept.faster" and len(trial.decided.timing) == 3
    verified(ws)


def test_one_noisy_pair_of_step_times_decides_nothing(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, timing_pairs=3, time_deadband_pct=10.0, price_time=0.003, honest_pairs=0)
    world({0: 0.03})
    times(10.0, 10.0, first=13.5)
    _, trial = attempt(ws)
    assert trial.decided and trial.decided.reason == "kept.gain" and trial.decided.timing[0] == [10.0, 13.5]


def person_commits(ws: Workspace, knob: str, value: float) -> None:  # noqa: F811
    """Somebody adds a setting of their own on the search branch."""
    git(ws.root, "checkout", "-q", f"search/{TRACK}")
    path = ws.root / f"trainer/recipes/{TRACK}.toml"
    path.write_text((path.read_text() if path.exists() else "") + f"{knob} = {value}\n")
    git(ws.root, "add", str(path))
    git(ws.root, "-c", "user.name=p", "-c", "user.email=p@p", "commit", "-qm", "mine")
    git(ws.root, "checkout", "-q", "main")


def condemned(ws: Workspace, monkeypatch: pytest.MonkeyPatch, then: Any) -> None:  # noqa: F811
    """A keep that is to be reverted, with the loop killed just before; ``then`` happens meanwhile."""
    policy(monkeypatch, honest_pairs=2)
    world({0: 0.03, 1: -0.001})
    with monkeypatch.context() as m:
        arm(m, "before:revert")
        with pytest.raises(Killed):
            attempt(ws)
    then()


def test_a_persons_commit_survives_the_revert(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    condemned(ws, monkeypatch, lambda: person_commits(ws, "beta2", 0.97))
    run_search(ws, SearchOptions(track=TRACK, trials=1), SilentView(), None, FakeExecutor)
    state = read(ws)
    assert state.trials["nano-0001"].reverted
    assert "beta2 = 0.97" in recipe(ws) and "matrix_lr" not in recipe(ws)
    verified(ws)


def test_a_revert_whose_branch_moved_is_planned_again(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    condemned(ws, monkeypatch, lambda: None)
    with monkeypatch.context() as m:
        wound(m, "swap", True)
        with pytest.raises(Killed):  # the intent is written, the branch has not moved
            run_search(ws, SearchOptions(track=TRACK, trials=1), SilentView(), None, FakeExecutor)
    person_commits(ws, "beta2", 0.97)
    for _ in range(2):
        run_search(ws, SearchOptions(track=TRACK, trials=1), SilentView(), None, FakeExecutor)
    trial = read(ws).trials["nano-0001"]
    assert trial.revert_void and trial.reverted and not trial.stands
    assert "beta2 = 0.97" in recipe(ws) and "matrix_lr" not in recipe(ws)
    verified(ws)


def test_a_reverted_keep_does_not_come_back_with_the_branch(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    policy(monkeypatch, honest_pairs=2)
    world({0: 0.03, 1: -0.001})
    _, trial = attempt(ws)
    assert trial.reverted and trial.done
    git(ws.root, "branch", "-f", f"search/{TRACK}", trial.done.sha)
    with pytest.raises(UserError, match=f"no longer contains its last commit {trial.reverted.sha[:12]}"):
        attempt(ws, {"matrix_lr": 0.02})
    git(ws.root, "branch", "-D", f"search/{TRACK}")
    with pytest.raises(UserError, match=f"git branch search/{TRACK} {trial.reverted.sha}"):
        attempt(ws, {"matrix_lr": 0.02})


def test_a_keep_is_settled_under_todays_policy(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    policy(monkeypatch, honest_pairs=0)
    world({0: 0.03, 1: -0.001})
    _, trial = attempt(ws)
    assert trial.stands and trial.honest is None
    policy(monkeypatch, honest_pairs=2, honest_extend=2)
    with monkeypatch.context() as m:
        arm(m, "after:honest.measured")
        with pytest.raises(Killed):
            run_search(ws, SearchOptions(track=TRACK, trials=1), SilentView(), None, FakeExecutor)
    policy(monkeypatch, honest_pairs=2, honest_extend=0)  # fewer seeds than were promised
    run_search(ws, SearchOptions(track=TRACK, trials=1), SilentView(), None, FakeExecutor)
    assert read(ws).trials["nano-0001"].reverted
    verified(ws)


@pytest.mark.parametrize("forge", ["timing.measured", "honest.measured", "revert.intent"])
def test_verify_notices_a_forged_record(
    ws: Workspace, forge: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:
    policy(monkeypatch, honest_pairs=2, timing_pairs=2)
    world({0: 0.03, 1: -0.001})
    attempt(ws)
    verified(ws)
    lies = {"timing.measured": {"pairs": [[10.0, 5.0], [10.0, 5.0]]}, "honest.measured": {"gain": 0.5},
            "revert.intent": {"reverts": "9" * 40}}
    copy = Ledger(tmp_path / "forged.jsonl")
    for record in Ledger(ws.ledger).records():
        if record.type.startswith("ledger."):
            continue
        body = structs.replace(record.body, **lies[forge]) if record.type == forge else record.body
        copy.append(record.type, body, search=record.search, trial=record.trial)
    report = verify(copy.path, [measured, honesty])
    assert not report.ok, "the chain is whole, the figures are not"
