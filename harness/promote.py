"""``autoresearch promote``: does a change hold on another track? Measured there, seed by seed, and recorded.

Candidate and base run the target track's confirm protocol on seeds that nothing else uses, the two sides taking
turns, through the same executor and referee as a search. The ledger gets one ``transfer.measured`` at the end; until
then finished runs lie in their folders under names that depend on what they are, so that a killed promotion picks
them up again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.bench import Bench, Budget
from harness.branch import refuse_dirty
from harness.data import ensure_data
from harness.errors import InfraError, UserError
from harness.executor import LocalExecutor, RunDone, RunFailed, RunRequest
from harness.gate.policy import load_policy
from harness.gitrepo import Repo, open_repo
from harness.recipe import parse_recipe
from harness.runner import kill_orphans
from harness.search import open_ledger
from harness.state import SearchState, TrialState, fold, measured_delta
from harness.tracks import Track, data_problem, declared_track, fingerprint, get_track, record_derivation, run_seed
from harness.views import View
from harness.workspace import Workspace, recipe_path, require_own_code
from ledger.lock import SearchLock
from ledger.measured import TransferMeasured
from ledger.mirror import REF, publish_ref
from ledger.records import RunFigures
from ledger.store import Ledger
from ledger.trials import total_bytes
from trainer.knobs import REGISTRY, KnobError, KnobValue

STACK = "stack:"
LEVEL = 0.90
"""Of the two-sided interval that a transfer is judged by."""

Side = Literal["base", "candidate"]
SIDES: tuple[Side, Side] = ("base", "candidate")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is promoted: a change, and the recipe that it stood on, both of the source track."""

    name: str  # trial id, or "stack of SEARCH"
    search: str
    trial: str  # "" for a stack
    seed: int  # of the search
    source: Track
    base: Mapping[str, KnobValue]  # recipe values
    change: Mapping[str, KnobValue]
    fingerprint: str  # under which it was judged
    gain: float | None  # bpb, positive = better; as the source track measured it last


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A subject on the target track: every knob of both sides, and the base's knobs that the track locks."""

    base: dict[str, KnobValue]
    candidate: dict[str, KnobValue]
    left_out: tuple[str, ...]

    def of(self, side: Side) -> dict[str, KnobValue]:
        """Knobs of one side."""
        return self.base if side == "base" else self.candidate


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The record, what stood behind it, and whether it was there already (then without the runs' figures)."""

    record: TransferMeasured
    subject: Subject
    placed: Placed
    seeds: list[int]  # by pair
    cap_bytes: int
    runs: Mapping[Side, Sequence[RunFigures]]
    known: bool = False


def promote(
    ws: Workspace, what: str, to: str, view: View, *, pairs: int = 4, search: str = "",
    make_executor: Callable[..., LocalExecutor] = LocalExecutor,
) -> Transfer:
    """Measure a trial's change, or the stack of a search (``stack:NAME``), on track ``to`` over ``pairs`` seeds.

    Raises UserError, LedgerError, InfraError; ``harness.bench.Stopped`` after an interrupt, resumable.
    ``make_executor`` takes LocalExecutor's arguments.
    """
    require_own_code(ws)
    target = get_track(to, "--to")
    if pairs < 2:
        raise UserError(f"--pairs {pairs}: expected 2 or more: one difference has no spread to judge it by")
    repo = open_repo(ws.root)
    refuse_dirty(repo)
    # Everything a person can have got wrong is found before anything is written.
    if not ws.ledger.is_file() and repo.rev(REF) is None:
        raise UserError(f"{ws.ledger}: no ledger yet; a trial is promoted after `autoresearch search` has judged it")
    if ws.ledger.is_file():
        place(find_subject(repo, Ledger(ws.ledger), what, search), target)
    if problem := data_problem(target, ws.data):
        raise UserError(f"--to {to}: {problem}")
    with SearchLock(ws.search_lock):
        kill_orphans(ws.runs)
        ledger = open_ledger(ws, view)
        subject = find_subject(repo, ledger, what, search)
        placed = place(subject, target)
        data_dir, data_hash = ensure_data(ws, target, view.note)
        commit = repo.rev("HEAD")
        assert commit
        executor = make_executor(repo=repo, track=target, data_dir=data_dir, runs=ws.runs, slots=ws.slots,
                                 pinned=commit)
        try:
            bench = Bench(
                search=subject.search, seed=subject.seed, branch="", track=target,
                policy=load_policy(target.policy_track), repo=repo, ledger=ledger, executor=executor, view=view,
                fingerprint=fingerprint(target, data_hash, executor.evaluator_hash)[0], budget=Budget(),
                state=SearchState(subject.search), mirror=lambda: publish_ref(ws.main, ws.ledger))
            return _transfer(bench, subject, placed, pairs, commit)
        finally:
            executor.stop()
            executor.close()


# -- what is promoted ----------------------------------------------------------------------------


def find_subject(repo: Repo, ledger: Ledger, what: str, search: str = "") -> Subject:
    """The trial or stack that a person named. Raises UserError."""
    if what.startswith(STACK):
        name = what.removeprefix(STACK)
        if search not in ("", name):
            raise UserError(f"--search {search}: {what} names its search itself; leave --search out")
        return _stack(repo, ledger, name)
    searches = sorted({r.search for r in ledger.records(types=["trial.proposed"], trial=what)
                       if search in ("", r.search)})
    if not searches:
        known = ", ".join([r.trial for r in ledger.records(types=["decided"]) if search in ("", r.search)][-5:])
        raise UserError(f"{what}: no such trial{f' in search {search}' if search else ''}; decided last: "
                        f"{known or 'none yet'}; a search's whole stack is {STACK}NAME")
    if len(searches) > 1:
        raise UserError(f"{what}: a trial of each of {', '.join(searches)}; say which with --search")
    state = fold(ledger.records(search=searches[0]), searches[0])
    return _trial(repo, state, state.trials[what])


def _trial(repo: Repo, state: SearchState, trial: TrialState) -> Subject:
    proposed = trial.proposed
    if trial.decided is None:
        raise UserError(f"{trial.id}: {trial.reason or 'not decided yet'}; only a decided trial is promoted")
    if proposed.kind != "knobs" or not proposed.change:
        raise UserError(f"{trial.id}: a {proposed.kind} proposal; only knob changes can be promoted")
    source = declared_track(state.started[-1].track, f"{trial.id} was judged on track")
    base = _recipe(repo, proposed.parent_commit, source, trial.id)
    delta = measured_delta(trial)
    try:
        change = REGISTRY.parse(proposed.change)
    except KnobError as e:
        raise UserError(f"{trial.id}: its change is not possible with this version: {e}") from None
    return Subject(
        name=trial.id, search=state.search, trial=trial.id, seed=state.started[0].seed, source=source, base=base,
        change=change, fingerprint=proposed.fingerprint, gain=None if delta is None else -delta)


def _stack(repo: Repo, ledger: Ledger, name: str) -> Subject:
    state = fold(ledger.records(search=name), name)
    if not state.started:
        known = sorted({r.search for r in ledger.records(types=["search.started"])})
        raise UserError(f"{STACK}{name}: no such search; valid: {', '.join(known) or 'none yet'}")
    tip = repo.rev(f"refs/heads/search/{name}")
    if tip is None:
        raise UserError(f"{STACK}{name}: branch search/{name} is not there; in a fresh clone `git branch search/{name} "
                        f"origin/search/{name}` makes it, elsewhere `autoresearch search --name {name}` says how")
    subject, first = f"stack of {name}", state.started[0]
    source = declared_track(first.track, f"{subject} was judged on track")
    base = _recipe(repo, first.incumbent_commit, source, subject)
    before, after = source.resolve(base), source.resolve(_recipe(repo, tip, source, subject))
    change = {k: v for k, v in after.items() if before[k] != v}
    if not change:
        raise UserError(f"{STACK}{name}: empty: the tip of search/{name} has the recipe that the search began with")
    last = state.started[-1].fingerprint
    return Subject(
        name=subject, search=name, trial="", seed=first.seed, source=source, base=base, change=change,
        fingerprint=last, gain=_stack_gain(state, REGISTRY.config_hash(before), REGISTRY.config_hash(after), last))


def _stack_gain(state: SearchState, base: str, tip: str, under: str) -> float | None:
    """Mean of the base's confirm controls minus the tip's, bpb, under one fingerprint; None unless both were run."""
    means = []
    for wanted in (base, tip):
        runs = [r.val_bpb for (stage, _, config, found), group in state.controls.items() for r in group.values()
                if (stage, config, found) == ("confirm", wanted, under)]
        if not runs:
            return None
        means.append(statistics.fmean(runs))
    return means[0] - means[1]


def _recipe(repo: Repo, commit: str, track: Track, subject: str) -> dict[str, KnobValue]:
    if repo.rev(commit) is None:
        raise UserError(f"{subject}: commit {commit[:12]}, whose recipe it stands on, is not in this repository; "
                        "fetch the search's branch from where it ran")
    return parse_recipe(repo.show(commit, recipe_path(track.name)), track)


def place(subject: Subject, target: Track) -> Placed:
    """Both sides' knobs on the target track. Raises UserError naming the knob that cannot be set there."""
    if target.name == subject.source.name:
        raise UserError(f"--to {target.name}: {subject.name} was judged on that track; a transfer is to another one")
    locked = sorted(set(subject.change) & target.locked)
    if locked:
        raise UserError(f"knob {', '.join(locked)}: fixed by track {target.name}, so {subject.name}, which changes it, "
                        "cannot be measured there")
    left_out = tuple(sorted(set(subject.base) & target.locked))
    values = {k: v for k, v in subject.base.items() if k not in left_out}
    try:
        base = target.resolve(values)
        candidate = target.resolve(values, subject.change)
    except UserError as e:
        raise UserError(f"{subject.name} cannot be set on track {target.name}: {e}") from None
    if REGISTRY.config_hash(base) == REGISTRY.config_hash(candidate):
        raise UserError(f"{subject.name}: nothing to measure on track {target.name}: there its base already has "
                        + ", ".join(f"{k} = {v}" for k, v in subject.change.items()))
    return Placed(base=base, candidate=candidate, left_out=left_out)


# -- measuring -----------------------------------------------------------------------------------


def turns(pairs: int) -> list[tuple[int, Side]]:
    """(pair, side) in the order of their runs: who goes first alternates, so that a drift in time hits both alike."""
    return [(k, side) for k in range(pairs) for side in (SIDES if k % 2 == 0 else SIDES[::-1])]


def seeds_of(subject: Subject, target: Track, pairs: int) -> list[int]:
    """Seeds that no search, and no other promotion, uses."""
    return [run_seed(subject.seed, f"transfer:{target.name}:{subject.name}", 0, k) for k in range(pairs)]


def _transfer(bench: Bench, subject: Subject, placed: Placed, pairs: int, commit: str) -> Transfer:
    hashes = REGISTRY.config_hash(placed.base), REGISTRY.config_hash(placed.candidate)
    known = _known(bench, subject, hashes, pairs)
    if known:
        return Transfer(record=known, subject=subject, placed=placed, cap_bytes=bench.track.cap_bytes, runs={},
                        seeds=seeds_of(subject, bench.track, len(known.ks)), known=True)
    record_derivation(bench.ledger, bench.track)
    seeds = seeds_of(subject, bench.track, pairs)
    runs: dict[Side, dict[int, RunFigures]] = {side: {} for side in SIDES}
    requests = [_request(bench, subject, side, k, seeds[k], placed.of(side), commit) for k, side in turns(pairs)]
    bench.view.status.search, bench.view.status.track = f"promote {subject.name}", bench.track.name

    def done(outcome: RunDone) -> None:
        run = outcome.figures
        side: Side = "base" if outcome.request.owner == "base" else "candidate"
        runs[side][run.k] = run
        bench.view.note(f"{side} #{run.k}: {run.val_bpb:.4f} bpb, {run.wall_seconds:.0f} s")

    restore = bench.handle_signals()
    try:
        with bench.view:
            for i in range(0, len(requests), bench.executor.workers):
                bench.check_stop()
                bench.view.status.doing = f"{subject.name} on {bench.track.name}: {i} of {len(requests)} runs"
                _refuse(bench.track, bench.wave(requests[i:i + bench.executor.workers], done))
            ordered: dict[Side, list[RunFigures]] = {side: [runs[side][k] for k in range(pairs)] for side in SIDES}
            record = summarise(subject, placed, bench.track, bench.fingerprint, ordered["base"], ordered["candidate"])
            bench.write("transfer.measured", record, subject.trial)
            bench.publish()
    finally:
        restore()
    return Transfer(record=record, subject=subject, placed=placed, seeds=seeds, cap_bytes=bench.track.cap_bytes,
                    runs=ordered)


def _known(bench: Bench, subject: Subject, hashes: tuple[str, str], pairs: int) -> TransferMeasured | None:
    """An equal measurement in the ledger over at least so many pairs: running it again would learn nothing."""
    for record in bench.ledger.records(types=["transfer.measured"]):
        b = record.body
        if isinstance(b, TransferMeasured) and len(b.ks) >= pairs and (
            b.subject, b.track, b.fingerprint, b.base_config, b.config_hash
        ) == (subject.name, bench.track.name, bench.fingerprint, *hashes):
            return b
    return None


def _request(bench: Bench, subject: Subject, side: Side, k: int, seed: int, knobs: Mapping[str, KnobValue],
             commit: str) -> RunRequest:
    slug = subject.name.replace(" ", "-")
    return RunRequest(
        run_id=f"transfer-{slug}-{bench.track.name}-{side}-{k}-{REGISTRY.config_hash(knobs)[:8]}"
               f"-{bench.fingerprint[:8]}",
        owner=side if side == "base" else subject.name, stage="confirm", k=k, seed=seed,
        knobs={**knobs, "iterations": bench.track.confirm_steps}, commit=commit, split="val",
        max_tokens=bench.track.val_tokens)


def _refuse(track: Track, failures: Sequence[RunFailed]) -> None:
    if not failures:
        return
    f = failures[0]
    side = "base" if f.request.owner == "base" else "candidate"
    raise InfraError(f"the {side}'s run {f.request.run_id} failed on track {track.name} ({f.kind}): {f.detail}\n"
                     f"{f.log_tail.strip()[-1500:]}\nNothing was recorded. Finished runs are kept: the same command "
                     "goes on from there")


# -- judging -------------------------------------------------------------------------------------


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float, float]:
    """(mean, standard error, low, high): the two-sided Student t interval of the mean of at least two values."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    se = statistics.stdev(values) / math.sqrt(n)
    half = float(t.ppf(0.5 + level / 2, n - 1)) * se
    return mean, se, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """transfers | reverses | unclear: where the whole interval of the gain lies."""
    return "transfers" if low > 0 else "reverses" if high < 0 else "unclear"


def summarise(
    subject: Subject, placed: Placed, target: Track, under: str, base: Sequence[RunFigures],
    candidate: Sequence[RunFigures],
) -> TransferMeasured:
    """The record of a measurement: pairs in order, base[i] and candidate[i] of one seed.

    Bytes are code + artifact, largest seed against largest; step time is median against median, in per cent.
    """
    gains = [b.val_bpb - c.val_bpb for b, c in zip(base, candidate, strict=True)]
    mean, se, low, high = interval(gains)
    step = [statistics.median(r.step_ms for r in runs) for runs in (base, candidate)]
    return TransferMeasured(
        subject=subject.name, change=dict(subject.change), source_track=subject.source.name,
        source_fingerprint=subject.fingerprint, source_gain=subject.gain, track=target.name, fingerprint=under,
        base_config=REGISTRY.config_hash(placed.base), config_hash=REGISTRY.config_hash(placed.candidate),
        ks=[r.k for r in base], differences=gains, gain=mean, se=se, low=low, high=high,
        delta_bytes=max(map(total_bytes, candidate)) - max(map(total_bytes, base)),
        delta_step_pct=100.0 * (step[1] / step[0] - 1.0) if step[0] > 0 else 0.0, verdict=verdict(low, high),
        # A run that was finished before a kill is only scored again: what it cost then is in its own clocks.
        seconds=round(sum(max(r.wall_seconds, r.train_seconds + r.eval_seconds) for r in (*base, *candidate)), 3))
