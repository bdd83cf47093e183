"""Calibration: how noisy is this track on this machine? Measured before trials spend runs on guessing it.

Also here, for panels too: a session of measuring runs of today's incumbent and of changes to it, through the same
executor and referee as a search, resumable run by run. The loop (``harness.search``, ``harness.stages``) is
imported only when a session opens, so that the loop itself may import this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import msgspec

from harness.bench import Bench, Budget, Stopped
from harness.branch import refuse_dirty
from harness.data import ensure_data
from harness.errors import InfraError, UserError
from harness.executor import LocalExecutor, RunDone, RunFailed, RunRequest
from harness.gate.correlation import calibration_for, pooled_sigma, same_seed
from harness.gate.early import dev_every
from harness.gate.policy import load_policy
from harness.gitrepo import Repo, open_repo
from harness.plan import MAX_SEEDS, MIN_SEEDS, Cost, cost_of, run_time, timed_runs
from harness.runner import kill_orphans
from harness.state import SearchState, fold
from harness.tracks import (
    Track,
    environment,
    fingerprint,
    get_track,
    record_derivation,
    run_seed,
)
from harness.transaction import candidate_files
from harness.views import View
from harness.workspace import Workspace, require_own_code
from ledger.durable import atomic_write
from ledger.lock import SearchLock
from ledger.measured import CalibrationMeasured, EditNoise
from ledger.mirror import publish_ref
from ledger.records import RunFigures
from trainer.knobs import REGISTRY, KnobError, KnobValue

if TYPE_CHECKING:
    from harness.stages import Incumbent

PURPOSE = "calibrate"  # of the seeds: no confirm seed is used up
FIGURES_DIR = "figures"  # under the workspace's state: finished runs, one file each, so that nothing is paid twice

REFERENCE_EDITS: tuple[tuple[str, Callable[[float], float]], ...] = (
    ("beta2", lambda v: v + 0.4 * (1.0 - v)),  # 0.95 -> 0.97
    ("matrix_lr", lambda v: 0.9 * v),
    ("tied_embed_lr", lambda v: 0.9 * v),
    ("scalar_lr", lambda v: 1.1 * v),
    ("muon_momentum", lambda v: v - 0.2 * (1.0 - v)),  # 0.95 -> 0.94
    ("qk_gain_init", lambda v: 1.1 * v),
)
"""Small honest changes of knobs that every track has, relative to the incumbent's value."""


def reference_edits(track: Track, knobs: Mapping[str, KnobValue], count: int) -> list[dict[str, KnobValue]]:
    """The first ``count`` of REFERENCE_EDITS that change this incumbent. Raises UserError when there are fewer."""
    edits = [{knob: float(f"{new(float(knobs[knob])):.6g}")} for knob, new in REFERENCE_EDITS]
    found: list[dict[str, KnobValue]] = [dict(e) for e in edits if legal(track, knobs, e)]
    if not 1 <= count <= len(found):
        raise UserError(f"--edits {count}: expected 1 to {len(found)}, the reference edits that change something here: "
                        + ", ".join(f"{k}={v}" for e in found for k, v in e.items()))
    return found[:count]


def legal(track: Track, knobs: Mapping[str, KnobValue], change: Mapping[str, KnobValue]) -> bool:
    """Whether the change is free on the track, valid, and makes another configuration."""
    if set(change) & track.locked:
        return False
    try:
        resolved = REGISTRY.resolve(knobs, change)
    except KnobError:
        return False
    return REGISTRY.config_hash(resolved) != REGISTRY.config_hash(knobs)


@dataclass(frozen=True)
class Job:
    """One run: the incumbent, or a ``change`` to it, on seed ``k`` of the list ``purpose``."""

    label: str
    purpose: str
    stage: str  # breadth | confirm: what is scored
    steps: int
    k: int
    change: tuple[tuple[str, KnobValue], ...] = ()
    again: bool = False  # a second time, to see whether it repeats


@dataclass
class Session:
    """Everything that measuring needs, opened by :func:`open_session`."""

    ws: Workspace
    bench: Bench
    incumbent: Incumbent
    parts: dict[str, str]  # of the fingerprint
    code: str  # hash of the trainer's code that runs
    _requests: dict[Job, RunRequest] = dataclasses.field(default_factory=dict)  # made once: making one asks git

    def request(self, job: Job) -> RunRequest:
        """The run of a job: the search's own request, but for length, seed and name."""
        if job not in self._requests:
            self._requests[job] = self._make(job)
        return self._requests[job]

    def _make(self, job: Job) -> RunRequest:
        bench, change = self.bench, dict(job.change)
        knobs = {**self.incumbent.knobs, **change}
        files = candidate_files(bench.repo, bench.track, self.incumbent.commit, change) if change else {}
        base = bench.request(owner=job.label, stage=job.stage, k=job.k, knobs=knobs, commit=self.incumbent.commit,
                             files=files)
        generation = bench.state.generation
        name = (f"{bench.search}-{job.purpose}-{REGISTRY.config_hash(knobs)[:8]}-{job.stage}{job.steps}-g{generation}-"
                f"{job.k}{'-again' if job.again else ''}-{bench.fingerprint[:8]}")
        every = dev_every(bench.policy, job.steps) if job.stage == "breadth" else 0
        return dataclasses.replace(
            base, run_id=name, seed=run_seed(bench.seed, job.purpose, generation, job.k), dev_every=every,
            knobs={**knobs, "iterations": job.steps})

    def finished(self, job: Job) -> RunFigures | None:
        """Figures of an equal run that ended earlier."""
        request = self.request(job)
        try:
            kept = json.loads((self.ws.state / FIGURES_DIR / f"{request.run_id}.json").read_text(encoding="utf-8"))
            if kept["run"] != self._identity(request):
                return None
            return msgspec.convert(kept["figures"], RunFigures)
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: the run is made again
            return None

    def _identity(self, request: RunRequest) -> dict[str, Any]:
        return {"code": self.code, "fingerprint": self.bench.fingerprint, "seed": request.seed, "split": request.split,
                "max_tokens": request.max_tokens, "dev": [request.dev_every, request.dev_tokens],
                "knobs": dict(request.knobs)}

    def keep(self, outcome: RunDone) -> None:
        """Put a finished run where :meth:`finished` finds it, outside every folder that a run may write to."""
        folder = self.ws.state / FIGURES_DIR
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"run": self._identity(outcome.request), "figures": msgspec.to_builtins(outcome.figures)}
        atomic_write(folder / f"{outcome.request.run_id}.json", json.dumps(kept).encode())

    def cost(self, jobs: Sequence[Job]) -> Cost | None:
        """What the jobs will take; None while nothing under this fingerprint has been timed."""
        done = {j: f for j in jobs if (f := self.finished(j))}
        known = timed_runs(self.bench.ledger.records(), {self.bench.fingerprint})
        known += [(j.stage, f) for j, f in done.items()]
        rows = []
        for stage, steps in dict.fromkeys((j.stage, j.steps) for j in jobs):
            some = [j for j in jobs if (j.stage, j.steps) == (stage, steps)]
            time = run_time(known, stage, steps)
            if time is None:
                return None
            rows.append((len(some), sum(j not in done for j in some), time))
        return cost_of(rows, self.bench.executor.workers, self.bench.track.worker_price_per_hour)

    def measure(self, jobs: Sequence[Job]) -> tuple[dict[Job, RunFigures], list[RunFailed]]:
        """Make the runs that are not finished yet, in order. Raises Stopped when a person asked for it."""
        found = {job: f for job in jobs if (f := self.finished(job))}
        todo = [(job, self.request(job)) for job in jobs if job not in found]
        failures: list[RunFailed] = []
        for i in range(0, len(todo), self.bench.executor.workers):
            self.bench.check_stop()
            batch = todo[i:i + self.bench.executor.workers]
            by_id = {request.run_id: job for job, request in batch}
            self.bench.view.status.doing = f"{len(found)} of {len(jobs)} runs are done"

            def done(outcome: RunDone, by_id: dict[str, Job] = by_id) -> None:
                self.keep(outcome)
                job, run = by_id[outcome.request.run_id], outcome.figures
                found[job] = run
                self.bench.view.note(f"{job.label} {job.stage} #{job.k}{' again' if job.again else ''}: "
                                     f"{run.val_bpb:.4f} bpb, {run.wall_seconds:.0f} s ({len(found)} of {len(jobs)})")

            failures += self.bench.wave([request for _, request in batch], done)
        return found, failures

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """The live view and the meaning of Ctrl-C while runs are going."""
        restore = self.bench.handle_signals()
        try:
            with self.bench.view:
                yield
        finally:
            restore()


@contextlib.contextmanager
def open_session(
    ws: Workspace, track_name: str, name: str, view: View, make_executor: Callable[..., LocalExecutor] = LocalExecutor,
) -> Iterator[Session]:
    """Take the search lock and get ready to run. Raises UserError, LedgerError, InfraError as a search does."""
    from harness.search import open_ledger, search_name
    from harness.stages import incumbent

    require_own_code(ws)
    track = get_track(track_name)
    name = search_name(name or track.name)
    policy = load_policy(track.policy_track)
    repo = open_repo(ws.root)
    with SearchLock(ws.search_lock):
        kill_orphans(ws.runs)
        ledger = open_ledger(ws, view)
        state = fold(ledger.records(search=name), name)
        branch = _tip(repo, name, state, track)
        refuse_dirty(repo)
        data_dir, data_hash = ensure_data(ws, track, view.note)
        pinned = repo.rev("HEAD")
        assert pinned
        executor = make_executor(repo=repo, track=track, data_dir=data_dir, runs=ws.runs, slots=ws.slots, pinned=pinned)
        try:
            fp, parts = fingerprint(track, data_hash, executor.evaluator_hash)
            bench = Bench(
                search=name, seed=state.started[0].seed if state.started else 1, branch=branch, track=track,
                policy=policy, fingerprint=fp, repo=repo, ledger=ledger, executor=executor, view=view,
                budget=Budget(), state=state, mirror=lambda: publish_ref(ws.main, ws.ledger))
            view.status.search, view.status.track = name, track.name
            inc = incumbent(bench)
            yield Session(ws, bench, inc, parts, repo.code_tree(inc.commit))
        finally:
            executor.stop()
            executor.close()


def _tip(repo: Repo, name: str, state: SearchState, track: Track) -> str:
    """Where today's incumbent is: the search's branch, or HEAD before it begins or when the branch would follow it.

    Nothing is moved. Raises UserError as the start of a search would.
    """
    if state.started and state.started[0].track != track.name:
        raise UserError(f"--name {name}: that search belongs to track {state.started[0].track}, not {track.name}; "
                        "give --track and --name of one search")
    ref = f"refs/heads/search/{name}"
    tip, head = repo.rev(ref), repo.rev("HEAD")
    assert head
    if tip is None and state.kept:
        raise UserError(f"branch search/{name} is gone, but the ledger has its kept commits; start the search: it says "
                        "how to bring the branch back")
    if tip is None or (repo.code_tree(tip) != repo.code_tree(head) and repo.is_ancestor(tip, head)):
        return "HEAD"
    if repo.code_tree(tip) != repo.code_tree(head):
        raise UserError(f"search/{name} and your HEAD hold different trainer code; `git merge search/{name}` brings "
                        "them together, then measure")
    return ref


@dataclass(frozen=True)
class Outcome:
    """How a calibration or panel ended. ``ended``: measured | known | declined | stopped."""

    ended: str
    done: int
    of: int
    body: Any = None
    track: str = ""


def paid(session: Session, jobs: Sequence[Job], ask: Callable[[Cost], bool]) -> bool:
    """Show the cost through ``ask``; whether to go on. Without any timed run the first ones are made and timed."""
    cost = session.cost(jobs)
    if cost is None:
        workers = session.bench.executor.workers  # as many as will run side by side: one alone would be faster
        session.bench.view.note(f"nothing has been timed under this fingerprint yet: {workers} of the runs are made to "
                                "time them")
        with session.attended():
            refuse_failed(session.measure(jobs[:workers])[1])
        cost = session.cost(jobs)
        assert cost is not None
    return not cost.left or ask(cost)


def refuse_failed(failures: Sequence[RunFailed]) -> None:
    """Raise InfraError when a run failed that must not: the incumbent's, or a small edit's."""
    if failures:
        f = failures[0]
        raise InfraError(f"run {f.request.run_id} ({f.request.owner}) failed ({f.kind}): {f.detail}\n"
                         f"{f.log_tail.strip()[-1500:]}\nMend this, then start the same command: it goes on from here.")


def calibration_jobs(track: Track, edits: Sequence[Mapping[str, KnobValue]], seeds: int) -> list[Job]:
    """The first seed twice, then seed by seed the incumbent and every edit: both sides of a pair close in time."""
    def job(k: int, change: Mapping[str, KnobValue], again: bool = False) -> Job:
        label = ", ".join(f"{n}={v:g}" for n, v in change.items()) or "incumbent"
        return Job(label, PURPOSE, "confirm", track.confirm_steps, k, tuple(change.items()), again)

    jobs = [job(0, {}), job(0, {}, True)]
    for k in range(seeds):
        jobs += [job(k, {})] * (k > 0) + [job(k, edit) for edit in edits]
    return jobs


def run_calibration(
    ws: Workspace, *, track: str, name: str, seeds: int, edits: int, view: View, ask: Callable[[Cost], bool],
    make_executor: Callable[..., LocalExecutor] = LocalExecutor,
) -> Outcome:
    """Measure the noise and write one ``calibration.measured``. Resumable: finished runs are not made again."""
    if not MIN_SEEDS <= seeds <= MAX_SEEDS:
        raise UserError(f"--seeds {seeds}: expected {MIN_SEEDS} to {MAX_SEEDS}")
    with open_session(ws, track, name, view, make_executor) as session:
        changes = reference_edits(session.bench.track, session.incumbent.knobs, edits)
        jobs = calibration_jobs(session.bench.track, changes, seeds)
        try:
            if not paid(session, jobs, ask):
                return Outcome("declined", 0, len(jobs), track=track)
            with session.attended():
                found, failures = session.measure(jobs)
        except Stopped:
            return Outcome("stopped", sum(session.finished(j) is not None for j in jobs), len(jobs), track=track)
        refuse_failed(failures)
        body = calibration(session, jobs, found)
        last = calibration_for(session.bench.ledger.records(), body.fingerprint)
        if last and msgspec.structs.replace(last, commit=body.commit) == body:  # another commit of the same code
            return Outcome("known", len(jobs), len(jobs), body, track)
        record_derivation(session.bench.ledger, session.bench.track)
        session.bench.write("calibration.measured", body)
        session.bench.publish()
        return Outcome("measured", len(jobs), len(jobs), body, track)


def calibration(session: Session, jobs: Sequence[Job], found: Mapping[Job, RunFigures]) -> CalibrationMeasured:
    """The record, from the figures of every job."""
    by_change: dict[tuple[tuple[str, KnobValue], ...], list[RunFigures]] = {}
    for job in jobs:
        if not job.again:
            by_change.setdefault(job.change, []).append(found[job])
    base = by_change.pop(())
    again = next(found[j] for j in jobs if j.again)
    values = [r.val_bpb for r in base]
    gaps = {change: [b.val_bpb - r.val_bpb for b, r in zip(base, runs, strict=True)]
            for change, runs in by_change.items()}
    together = same_seed([values, *([r.val_bpb for r in runs] for runs in by_change.values())])
    steps = [r.step_ms for r in (*base, again)]
    sizes = [r.artifact_bytes for r in base]
    bench = session.bench
    return CalibrationMeasured(
        track=bench.track.name, fingerprint=bench.fingerprint, fingerprint_parts=session.parts, stage="confirm",
        config_hash=session.incumbent.config, commit=session.incumbent.commit, seeds=[r.seed for r in base],
        values=values, sigma_run=stdev(values), same_seed=[base[0].val_bpb, again.val_bpb],
        bitwise=(base[0].artifact_sha256, base[0].val_bpb) == (again.artifact_sha256, again.val_bpb),
        edits=[EditNoise(change=dict(c), differences=d, sigma_d=stdev(d)) for c, d in gaps.items()],
        sigma_d=pooled_sigma(list(gaps.values()))[0], correlation=together.value, correlation_low=together.low,
        correlation_high=together.high, step_ms_spread_pct=100.0 * stdev(steps) / fmean(steps),
        bytes_spread=max(sizes) - min(sizes), seconds=round(sum(r.wall_seconds for r in found.values()), 3),
        environment=environment(bench.track))

