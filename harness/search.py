"""The unattended loop: propose, measure, judge, commit, log; starts, resumes, stops cleanly."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.contract import Context, Exhausted, Proposal, Proposer
from agent.proposers import make_proposer
from harness.bench import Bench, Budget, Stopped
from harness.branch import catch_up, heal_checkout, refuse_dirty, same_history, search_branch
from harness.data import ensure_data
from harness.errors import InfraError, UserError
from harness.executor import LocalExecutor
from harness.gate.policy import load_policy
from harness.gitrepo import Repo, open_repo
from harness.noisebasis import noise_basis
from harness.recipe import parse_recipe
from harness.runner import kill_orphans
from harness.settle import last_unsettled, settle, take_back
from harness.stages import (
    Incumbent,
    bank_filler,
    breadth,
    confirm,
    ensure_controls,
    incumbent,
    predict_bytes,
    preflight,
)
from harness.state import SearchState, TrialState, fold
from harness.tracks import Track, data_problem, differences, environment, fingerprint, get_track, record_derivation
from harness.transaction import commit_keep, revert_keep
from harness.views import View
from harness.workspace import Workspace, recipe_path, require_own_code
from ledger.errors import LedgerError
from ledger.lock import SearchLock
from ledger.measured import TrialReverted
from ledger.mirror import publish_ref, reconcile
from ledger.records import PreflightRefused, SearchEnded, SearchStarted, TrialAbandoned, TrialProposed
from ledger.store import Ledger
from trainer.knobs import REGISTRY, KnobError, KnobValue

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
MAX_REFUSED_IN_A_ROW = 25
MAX_INFRA_IN_A_ROW = 3


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What a person asks of one ``search``."""

    track: str = "pocket"
    name: str = ""  # default: the track's name
    seed: int | None = None  # default: the search's own, 1 for a new one
    agent: str = "garden"
    trials: int | None = None
    deadline: float | None = None
    why_deadline: str = "budget.hours"
    keeps: int | None = None  # stop at so many keeps in all


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """How it ended. ``reason``: budget.* | stopped | exhausted | nothing-to-do."""

    search: str
    reason: str
    state: SearchState
    seconds: float


def run_search(
    ws: Workspace, options: SearchOptions, view: View, proposal: Proposal | None = None,
    make_executor: Callable[..., LocalExecutor] = LocalExecutor,
) -> SearchOutcome:
    """Run or resume a search; with ``proposal``, judge just that one. Raises UserError, LedgerError, InfraError.

    ``make_executor`` takes LocalExecutor's arguments (tests and benchmarks put their own there).
    """
    require_own_code(ws)
    track = get_track(options.track)
    if problem := data_problem(track, ws.data):
        raise UserError(f"--track {track.name}: {problem}")
    name = search_name(options.name or track.name)
    proposer, policy = make_proposer(options.agent, ws.kb), load_policy(track.policy_track)
    repo = open_repo(ws.root)
    with SearchLock(ws.search_lock):
        kill_orphans(ws.runs)
        ledger = open_ledger(ws, view)
        state = fold(ledger.records(search=name), name)
        branch = search_branch(repo, name, state, track, view)
        for lock in repo.clear_stale_locks(branch):
            view.note(f"removed {lock}, left by a git that was killed")
        for trial in list(state.trials.values()):
            if trial.owes_commit:
                commit_keep(repo, ledger, track, name, branch, trial)
                view.note(f"{trial.id}: finished the commit that was interrupted")
            elif trial.owes_revert:
                done = revert_keep(repo, ledger, track, name, branch, trial)
                view.note(f"{trial.id}: finished the revert that was interrupted" if isinstance(done, TrialReverted)
                          else f"{trial.id}: its revert is planned again: {done.reason}")
        state = fold(ledger.records(search=name), name)
        heal_checkout(repo, state, branch)
        same_history(repo, ledger, state, branch)
        refuse_dirty(repo)
        catch_up(repo, branch, view)
        data_dir, data_hash = ensure_data(ws, track, view.note)
        budget = Budget(options.trials, options.deadline, options.why_deadline, options.keeps)
        complete = state.complete and not last_unsettled(state, policy)
        if proposal is None and complete and budget.spent(state) in ("budget.trials", "budget.keeps"):
            publish_ref(ws.main, ws.ledger)
            return SearchOutcome(search=name, reason="nothing-to-do", state=state, seconds=0.0)
        with _executor(ws, repo, track, data_dir, make_executor) as executor:
            fp, parts = fingerprint(track, data_hash, executor.evaluator_hash)
            record_derivation(ledger, track)
            _say_what_changed(state, track, parts, view)
            policy, calibration = noise_basis(ledger.records(), track, policy, fp, parts, view.note)
            bench = Bench(
                search=name, seed=_seed(options, state), branch=branch, track=track, policy=policy,
                fingerprint=fp, repo=repo, ledger=ledger, executor=executor, view=view, budget=budget, state=state,
                calibration=calibration, mirror=lambda: publish_ref(ws.main, ws.ledger),
            )
            return _drive(bench, options, parts, proposer, proposal)


def _say_what_changed(state: SearchState, track: Track, parts: dict[str, str], view: View) -> None:
    """A resumed search whose figures will not compare with its earlier ones says why, before it measures anew."""
    if state.started:
        last = state.started[-1]
        changed = differences(last.fingerprint_parts, parts, (last.environment, environment(track)))
        if changed:
            view.note("earlier figures of this search do not compare with today's: " + "; ".join(changed)
                      + ". The incumbent is measured anew")


def search_name(name: str) -> str:
    """A name that is safe in branch names, run folders and trial ids. Raises UserError."""
    if not NAME.fullmatch(name) or name.endswith((".lock", ".")) or ".." in name:
        raise UserError(f"--name {name!r}: expected 1 to 40 of a-z, 0-9, '.', '_' and '-', starting with a letter or "
                        "digit, for example --name pocket-2")
    return name


def open_ledger(ws: Workspace, view: View | None = None) -> Ledger:
    """The workspace's ledger, reconciled with its ref (restored if a reset or clean took it)."""
    ws.ledger.parent.mkdir(parents=True, exist_ok=True)
    notice = reconcile(ws.main, ws.ledger)
    if view and notice.split(":")[0] not in ("new", "equal", "extends", "unpublished"):
        view.note(notice)
    return Ledger(ws.ledger)


@contextlib.contextmanager
def _executor(
    ws: Workspace, repo: Repo, track: Track, data_dir: Path, make: Callable[..., LocalExecutor]
) -> Iterator[LocalExecutor]:
    pinned = repo.rev("HEAD")
    assert pinned
    executor = make(repo=repo, track=track, data_dir=data_dir, runs=ws.runs, slots=ws.slots, pinned=pinned)
    try:
        yield executor
    finally:
        executor.stop()
        executor.close()


def _seed(options: SearchOptions, state: SearchState) -> int:
    known = state.started[0].seed if state.started else None
    if options.seed is not None and known is not None and options.seed != known:
        raise UserError(f"--seed {options.seed}: search {state.search} runs with seed {known} from its first day; "
                        "leave --seed out, or start another search with --name")
    return options.seed if options.seed is not None else (known if known is not None else 1)


def _drive(bench: Bench, options: SearchOptions, parts: dict[str, str], proposer: Proposer,
           proposal: Proposal | None) -> SearchOutcome:
    begin = time.monotonic()
    inc = incumbent(bench)
    bench.view.status.begin = begin
    bench.view.status.search, bench.view.status.track = bench.search, bench.track.name
    bench.view.status.target, bench.view.status.budget = bench.budget.trials, bench.budget.words()
    restore = bench.handle_signals()
    kept_before = bench.state.generation
    try:
        with bench.view:
            bench.write("search.started", SearchStarted(
                track=bench.track.name, fingerprint=bench.fingerprint, fingerprint_parts=parts,
                policy_hash=bench.policy.hash, agent=options.agent, seed=bench.seed, branch=bench.branch,
                incumbent_commit=inc.commit, incumbent_config=inc.config, code_tree=bench.repo.code_tree(inc.commit),
                resumed=bool(bench.state.started), environment=environment(bench.track),
                budget={"trials": float(bench.budget.trials or 0), "deadline": bench.budget.deadline or 0.0}))
            reason = _loop(bench, proposer, proposal)
            bench.drain()
            bench.write("search.ended", SearchEnded(
                reason=reason, decided=bench.state.decided, kept=bench.state.generation - kept_before,
                seconds=time.monotonic() - begin))
            bench.publish()
    finally:
        restore()
    return SearchOutcome(search=bench.search, reason=reason, state=bench.state, seconds=time.monotonic() - begin)


def _loop(bench: Bench, proposer: Proposer, single: Proposal | None) -> str:
    """Trials until a budget, a signal or the proposer ends it; the reason is returned."""
    refused = infra = 0
    judged = False
    try:
        while True:
            trial = bench.state.open_trial
            bench.check_stop()
            inc = incumbent(bench)
            _show_incumbent(bench, inc)
            # Also after the last keep: a selected score is not inherited, its honest one is measured before the end.
            ensure_controls(bench, inc, "confirm", range(bench.policy.controls))
            settle(bench, inc)
            if _taken_back(bench):
                continue
            _show_incumbent(bench, inc)
            if trial is None:
                if judged and single is not None:
                    return "budget.trials"
                if single is None and bench.budget.spent(bench.state):
                    return bench.budget.spent(bench.state)
                trial = _propose(bench, inc, proposer, single)
                judged = True
                if trial.refused:
                    refused += 1
                    if refused >= MAX_REFUSED_IN_A_ROW:
                        return "exhausted"
                    continue
            _carry(bench, trial, inc)
            bench.publish()
            refused = refused + 1 if trial.refused else 0
            infra = infra + 1 if trial.reason == "failed.infra" else 0
            if infra >= MAX_INFRA_IN_A_ROW:
                raise InfraError(f"{infra} trials in a row failed by the machine's fault: {trial.failed.detail}"  # type: ignore[union-attr]
                                 "; mend it, then start the search again: it resumes here")
            if refused >= MAX_REFUSED_IN_A_ROW:
                return "exhausted"
    except Stopped as e:
        return str(e.args[0])
    except Exhausted as e:
        bench.view.note(f"nothing left to propose: {e}")
        return "exhausted"


def _propose(bench: Bench, inc: Incumbent, proposer: Proposer, single: Proposal | None) -> TrialState:
    """Ask for one proposal, log it, refuse what needs no run to be refused."""
    bench.view.status.doing = "proposing"
    bench.filler = bank_filler(bench, inc)
    if proposer.slow and single is None:
        bench.fill_idle()
    context = make_context(bench, inc)
    begin = time.monotonic()
    retry = _voided(bench)
    p = single or retry or proposer.propose(context)
    agent = "person" if single else proposer.name
    problem: tuple[str, str] | None = None
    config = ""
    if p.kind == "patch":
        problem = ("refused.patch", "code proposals need the sandbox, which this version does not have yet: "
                                    "only knob changes are judged")
    else:
        try:
            knobs = bench.track.resolve(_recipe_values(bench, inc), p.change)
            config = REGISTRY.config_hash(knobs)
            if config in context.tried_configs and not p.retry_because:
                problem = ("rejected.duplicate", "this configuration was already judged on this track")
        except (UserError, KnobError) as e:
            problem = ("refused.invalid", str(e))
    number = bench.state.next_number
    trial_id = f"{bench.search}-{number:04d}"
    bench.write("trial.proposed", TrialProposed(
        number=number, kind=p.kind, agent=agent, line=p.line, hypothesis=p.hypothesis, change=dict(p.change),
        previous={k: inc.knobs[k] for k in p.change if k in inc.knobs}, predicted=dict(p.predicted),
        falsified_by=p.falsified_by, pages=list(p.pages), records=list(p.records), config_hash=config,
        proposal_hash=p.hash, parent_commit=inc.commit, parent_config=inc.config, generation=bench.state.generation,
        fingerprint=bench.fingerprint, move=p.move, retry_of=p.retry_of, retry_because=p.retry_because,
        latency_s=round(time.monotonic() - begin, 4)), trial_id)
    if problem:
        bench.write("preflight.refused", PreflightRefused(reason=problem[0], detail=problem[1]), trial_id)
    return bench.state.trials[trial_id]


def _recipe_values(bench: Bench, inc: Incumbent) -> dict[str, object]:
    plain = bench.track.resolve({})
    return {k: v for k, v in inc.knobs.items() if v != plain[k] and k not in bench.track.locked}


def _voided(bench: Bench) -> Proposal | None:
    """A keep whose commit was voided is judged again, once, on the new incumbent."""
    retried = {t.proposed.retry_of for t in bench.state.trials.values()}
    for t in bench.state.trials.values():
        if t.void and t.id not in retried:
            p = t.proposed
            return Proposal(line=p.line, hypothesis=p.hypothesis, change=p.change, move=p.move, predicted=p.predicted,
                            falsified_by=p.falsified_by, pages=tuple(p.pages), records=tuple(p.records),
                            retry_of=t.id, retry_because="its commit was voided: the incumbent had moved")
    return None


def make_context(bench: Bench, inc: Incumbent) -> Context:
    """What a proposer may read."""
    controls = bench.state.control_runs("confirm", bench.state.generation, inc.config, bench.fingerprint)
    size = max((predict_bytes(r, [r]) for r in controls.values()), default=0)
    return Context(
        track=bench.track.name, search=bench.search, seed=bench.seed, number=bench.state.next_number,
        incumbent=inc.knobs, incumbent_config=inc.config, locked=bench.track.locked,
        history=bench.state.past(bench.fingerprint),
        tried_configs=bench.state.tried(bench.fingerprint) | {inc.config},
        cap_bytes=bench.track.cap_bytes, incumbent_bytes=size,
    )


def _carry(bench: Bench, trial: TrialState, inc: Incumbent) -> None:
    """Take an open trial through its stages to its end, from wherever the ledger says it stands."""
    moved = trial.proposed.parent_commit != inc.commit or trial.proposed.fingerprint != bench.fingerprint
    if moved:
        bench.write("trial.abandoned", TrialAbandoned(
            reason="the incumbent or the measurement fingerprint changed while it was open"), trial.id)
        return
    if trial.preflight is None and not preflight(bench, trial, inc):
        return
    if not trial.runs["confirm"] and not breadth(bench, trial, inc):
        return
    confirm(bench, trial, inc)
    if trial.owes_commit:
        bench.publish()  # the record that decided it is safe in git before a commit cites it
        bench.crash_point("before:commit")
        commit_keep(bench.repo, bench.ledger, bench.track, bench.search, bench.branch, trial)
        _refold(bench)
        done = bench.state.trials[trial.id].done
        if done:
            bench.view.record("commit.done", trial.id, done)


def _taken_back(bench: Bench) -> bool:
    """Revert the last keep if its honest gain asks for it; True when the incumbent has changed."""
    trial = bench.state.trials[bench.state.kept[-1]] if bench.state.kept else None
    if trial is None or not trial.owes_revert:
        return False
    take_back(bench, trial)
    _refold(bench)
    done = bench.state.trials[trial.id].reverted
    if done:
        bench.view.record("trial.reverted", trial.id, done)
    return True


def _refold(bench: Bench) -> None:
    """The transaction writes to the ledger itself: read its events back."""
    bench.state = fold(bench.ledger.records(search=bench.search), bench.search)
    bench.filler = lambda: None  # of an incumbent that is one no more


def _show_incumbent(bench: Bench, inc: Incumbent) -> None:
    runs = bench.state.control_runs("confirm", bench.state.generation, inc.config, bench.fingerprint)
    status = bench.view.status
    status.decided, status.kept = bench.state.decided, len(bench.state.standing)
    if runs:
        status.best_bpb = sum(r.val_bpb for r in runs.values()) / len(runs)
        if bench.state.generation == 0:
            status.baseline_bpb = status.best_bpb


def load_state(ws: Workspace, search: str) -> SearchState:
    """Read-only: the state of a search as the ledger has it."""
    try:
        return fold(Ledger(ws.ledger).records(search=search), search)
    except FileNotFoundError as e:
        raise LedgerError(f"{ws.ledger}: no ledger yet; run `autoresearch search` first") from e


def incumbent_knobs(ws: Workspace, track: Track, search: str) -> dict[str, KnobValue]:
    """Resolved knobs of a search's incumbent; before its first start, those of the checkout's recipe."""
    repo = open_repo(ws.root)
    tip = repo.rev(f"refs/heads/search/{search}") or repo.rev("HEAD")
    assert tip
    return track.resolve(parse_recipe(repo.show(tip, recipe_path(track.name)), track))
