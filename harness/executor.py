"""Where runs execute. One interface, :class:`Executor`; here the local one: N workers, one git worktree each.

A run is two processes: the *trainer*, importing the candidate's own worktree, and the *referee*,
importing a pinned worktree of the code the search started with. Every figure that judges comes from the referee.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from harness.errors import InfraError
from harness.gitrepo import Repo
from harness.runner import ProcessOutcome, child_env, run_process
from harness.tracks import Track
from ledger.records import RunFigures
from trainer.contract import (
    ARTIFACT_FILE,
    EVENTS_FILE,
    LOG_FILE,
    RESULT_FILE,
    SCORE_FILE,
    SCORE_SPEC_FILE,
    SPEC_FILE,
    ContractError,
    Failure,
    FailureKind,
    RunResult,
    RunSpec,
    ScoreResult,
    ScoreSpec,
    Split,
    dump,
    load,
    load_outcome,
)
from trainer.tree import evaluator_hash, tree_hash

MAX_ATTEMPTS = 3  # of a run whose failure was the machine's
_ENDED: dict[str, FailureKind] = {"timeout": "timeout", "hang": "hang", "memory": "oom", "log": "crash"}


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """One run to be made. ``commit`` + ``files`` (path -> text laid over it) are the candidate's tree."""

    run_id: str
    owner: str  # trial id or "control": for display
    stage: str  # preflight | breadth | confirm | manual
    k: int
    seed: int
    knobs: Mapping[str, Any]
    commit: str
    files: Mapping[str, str] = field(default_factory=dict)
    split: Split = "val"
    max_tokens: int = 0
    fingerprint: str = ""  # under which the run is measured
    dev_every: int = 0  # steps between the trainer's looks at the dev slice; 0 = none
    dev_tokens: int = 0
    watch: Callable[[dict[str, Any]], str] | None = None  # sees every event; a word ends the run: it is given up


@dataclass(frozen=True, kw_only=True)
class RunFailed:
    """A run without figures, and whose fault it was."""

    request: RunRequest
    kind: FailureKind | Literal["stopped", "given-up"]
    detail: str
    log_tail: str = ""
    wall_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunDone:
    """A run with figures."""

    request: RunRequest
    figures: RunFigures


EventSink = Callable[[RunRequest, dict[str, Any]], None]


class Executor(Protocol):
    """``submit`` returns at once; the future yields RunDone or RunFailed and never raises for a run's own fault."""

    workers: int

    def submit(self, request: RunRequest, sink: EventSink) -> Future[RunDone | RunFailed]: ...

    def stop(self) -> None:
        """End every run now; their futures yield RunFailed("stopped")."""
        ...

    def close(self) -> None:
        """Wait for running work and release the workers."""
        ...


class LocalExecutor:
    """Runs on this machine: ``track.workers`` at a time."""

    def __init__(self, *, repo: Repo, track: Track, data_dir: Path, runs: Path, slots: Path, pinned: str) -> None:
        self.workers = track.workers
        self._repo, self._track, self._data, self._runs = repo, track, data_dir, runs
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="run")
        self._git_lock = threading.Lock()  # worktree bookkeeping is shared between worktrees
        self._referee = slots / "referee"
        repo.worktree(self._referee, pinned)
        self.evaluator_hash = evaluator_hash(self._referee / "trainer")
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(self.workers):
            self._free.put(slots / str(i))
        runs.mkdir(parents=True, exist_ok=True)

    def submit(self, request: RunRequest, sink: EventSink) -> Future[RunDone | RunFailed]:
        return self._pool.submit(self._run, request, sink)

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, request: RunRequest, sink: EventSink) -> RunDone | RunFailed:
        slot = self._free.get()
        try:
            outcome: RunDone | RunFailed | None = None
            for attempt in range(1, MAX_ATTEMPTS + 1):
                if self._stop.is_set():
                    return RunFailed(request=request, kind="stopped", detail="stopped before it began")
                try:
                    outcome = self._attempt(request, sink, slot, attempt)
                except (OSError, InfraError) as e:
                    outcome = RunFailed(request=request, kind="infra", detail=f"{type(e).__name__}: {e}")
                if not (isinstance(outcome, RunFailed) and outcome.kind == "infra"):
                    break
            assert outcome is not None
            return outcome
        finally:
            self._free.put(slot)

    def _attempt(self, request: RunRequest, sink: EventSink, slot: Path, attempt: int) -> RunDone | RunFailed:
        folder = self._runs / request.run_id
        spec = RunSpec(
            run_id=request.run_id, seed=request.seed, knobs=dict(request.knobs), data_dir=str(self._data),
            out_dir=str(folder), device=self._track.device, threads=self._track.threads,
            deterministic=self._track.deterministic, compile=self._track.compile,
            dev_every=request.dev_every, dev_tokens=request.dev_tokens,
        )
        expected = self._prepare(request, slot)
        result = _finished(folder, spec)
        wall = 0.0
        if result is None or _mismatch(result, request, expected, folder):
            outcome = self._train(request, spec, folder, slot, expected, sink)
            if isinstance(outcome, RunFailed):
                return outcome
            result, wall = outcome
        score = self._score(request, result, folder, sink)
        if isinstance(score, RunFailed):
            return score
        return RunDone(request=request, figures=figures(
            request, result, score[0], wall + score[1], attempt, dev_losses(folder)))

    def _prepare(self, request: RunRequest, slot: Path) -> str:
        """Make the worker's worktree the candidate's tree; returns the hash of its trainer."""
        with self._git_lock:
            self._repo.worktree(slot, request.commit)
        for path, text in request.files.items():
            target = slot / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        return tree_hash(slot / "trainer")

    def _train(
        self, request: RunRequest, spec: RunSpec, folder: Path, slot: Path, expected: str, sink: EventSink
    ) -> tuple[RunResult, float] | RunFailed:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        dump(spec, folder / SPEC_FILE)
        done = self._process(["train", str(folder / SPEC_FILE)], slot, folder, request, sink)
        failed = _failure(request, done, folder / RESULT_FILE)
        if failed:
            return failed
        result = load(RunResult, folder / RESULT_FILE)
        mismatch = _mismatch(result, request, expected, folder)
        if mismatch:
            return RunFailed(request=request, kind=mismatch[0], detail=mismatch[1], log_tail=done.log_tail,
                             wall_seconds=done.wall_seconds)
        return result, done.wall_seconds

    def _score(
        self, request: RunRequest, result: RunResult, folder: Path, sink: EventSink
    ) -> tuple[ScoreResult, float] | RunFailed:
        spec = ScoreSpec(
            run_id=request.run_id, artifact_path=str(folder / ARTIFACT_FILE), artifact_sha256=result.artifact_sha256,
            data_dir=str(self._data), out_dir=str(folder), split=request.split, max_tokens=request.max_tokens,
            seq_len=int(request.knobs["train_seq_len"]), device=self._track.device, threads=self._track.threads,
        )
        (folder / SCORE_FILE).unlink(missing_ok=True)
        dump(spec, folder / SCORE_SPEC_FILE)
        done = self._process(["score", str(folder / SCORE_SPEC_FILE)], self._referee, folder, request, sink)
        failed = _failure(request, done, folder / SCORE_FILE)
        if failed:
            return failed
        score = load(ScoreResult, folder / SCORE_FILE)
        if score.evaluator_hash != self.evaluator_hash:
            return RunFailed(request=request, kind="infra", detail="the referee's code changed while it was pinned",
                             log_tail=done.log_tail)
        return score, done.wall_seconds

    def _process(
        self, args: list[str], code: Path, folder: Path, request: RunRequest, sink: EventSink
    ) -> ProcessOutcome:
        return run_process(
            [sys.executable, "-P", "-m", "trainer", *args], cwd=folder,
            env=child_env(code, self._track.threads, folder), timeout_s=self._track.run_timeout_s,
            hang_s=self._track.hang_timeout_s, memory_bytes=self._track.memory_limit_bytes, stop=self._stop,
            on_event=lambda event: sink(request, event), watch=request.watch,
        )


def figures(
    request: RunRequest, result: RunResult, score: ScoreResult, wall_seconds: float, attempt: int = 1,
    dev: Sequence[tuple[int, float]] = (),
) -> RunFigures:
    """The trainer's figures and the referee's, side by side, as the ledger keeps them."""
    return RunFigures(
        run_id=request.run_id, seed=request.seed, k=request.k, val_bpb=score.val_bpb, val_loss=score.val_loss,
        artifact_bytes=result.artifact_bytes, code_bytes=result.code_bytes, artifact_sha256=score.artifact_sha256,
        train_seconds=round(result.train_seconds, 4), eval_seconds=round(score.eval_seconds, 4),
        wall_seconds=round(wall_seconds, 3), step_ms=round(result.step_ms, 4), steps=result.steps,
        tokens=result.tokens, params=result.params, peak_memory_bytes=result.peak_memory_bytes,
        final_train_loss=result.final_train_loss, split=score.split, eval_tokens=score.tokens,
        eval_bytes=score.bytes, tree_hash=result.tree_hash, evaluator_hash=score.evaluator_hash,
        data_fingerprint=score.data_fingerprint, attempt=attempt, payload_bytes=result.payload_bytes,
        fingerprint=request.fingerprint,
        dev=[[step, loss] for step, loss in dev],
    )


def dev_losses(folder: Path) -> list[tuple[int, float]]:
    """(step, nats/token) of the run's "dev" events. The trainer's own word; nonsense is left out."""
    found = []
    with contextlib.suppress(OSError), (folder / EVENTS_FILE).open(encoding="utf-8", errors="replace") as f:
        for line in f:
            if '"dev"' in line:
                with contextlib.suppress(ValueError):
                    point = dev_point(json.loads(line))
                    found += [point] if point else []
    return found


def dev_point(event: Any) -> tuple[int, float] | None:
    """(step, loss) of a "dev" event, if it is one and says something possible."""
    if not isinstance(event, dict) or event.get("kind") != "dev":
        return None
    step, loss = event.get("step"), event.get("dev_loss")
    known = isinstance(step, int) and isinstance(loss, float) and math.isfinite(loss)
    return (step, loss) if known else None  # type: ignore[return-value]


def _finished(folder: Path, spec: RunSpec) -> RunResult | None:
    """The result of an earlier, equal training run whose artifact is still there: it need not train again."""
    try:
        if json.loads((folder / SPEC_FILE).read_text(encoding="utf-8")) != dataclasses.asdict(spec):
            return None
        result = load_outcome(RunResult, folder / RESULT_FILE)
    except (OSError, ValueError):
        return None
    return None if isinstance(result, Failure) else result


def _mismatch(result: RunResult, request: RunRequest, tree: str, folder: Path) -> tuple[FailureKind, str] | None:
    """What a result says about itself, held against what can be seen from outside."""
    if result.tree_hash != tree:
        return "infra", f"the run imported trainer code {result.tree_hash[:12]}, not its own worktree's {tree[:12]}"
    if (result.run_id, result.seed) != (request.run_id, request.seed):
        return "crash", f"the result names run {result.run_id}, seed {result.seed}: not what was asked for"
    artifact = folder / ARTIFACT_FILE
    size = artifact.stat().st_size if artifact.is_file() else -1
    if size != result.artifact_bytes:
        return "export", f"the result claims an artifact of {result.artifact_bytes} bytes, on disk: {size}"
    return None


def _failure(request: RunRequest, done: ProcessOutcome, path: Path) -> RunFailed | None:
    """Classify how a process ended; None when it left its result."""
    def failed(kind: FailureKind | Literal["stopped", "given-up"], detail: str) -> RunFailed:
        return RunFailed(request=request, kind=kind, detail=detail, log_tail=done.log_tail,
                         wall_seconds=done.wall_seconds)

    what = "scoring" if path.name == SCORE_FILE else "training"
    if done.ended == "stopped":
        return failed("stopped", "stopped by the user")
    if done.ended == "given-up":
        return failed("given-up", done.why)
    if done.ended != "exit":
        return failed(_ENDED[done.ended], f"{what} ended by the supervisor: {done.ended} "
                                          f"after {done.wall_seconds:.0f} s (see {LOG_FILE}, {EVENTS_FILE})")
    if done.returncode == -9:
        return failed("infra", f"{what} was killed from outside (SIGKILL)")
    if done.returncode < 0:
        return failed("crash", f"{what} died of signal {-done.returncode}")
    if not path.is_file():
        last = done.log_tail.strip().splitlines()[-1:] or ["no output"]
        kind: FailureKind = "infra" if what == "scoring" or done.returncode == 2 else "crash"
        return failed(kind, f"{what} exited {done.returncode} without a result: {last[0][:300]}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if "failure" in data:
            note = load_outcome(RunResult, path)
            assert isinstance(note, Failure)
            return failed(note.failure, note.error[:500])
    except (ContractError, ValueError) as e:
        return failed("crash", f"{what} left an unreadable result: {e}")
    if done.returncode != 0:
        return failed("crash", f"{what} exited {done.returncode} after writing a result")
    return None
