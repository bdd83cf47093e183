"""The bench of a search: what every stage needs (ledger, executor, track, policy), and how runs are waited for."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from harness.errors import InfraError
from harness.executor import Executor, RunDone, RunFailed, RunRequest
from harness.gate.early import dev_every
from harness.gate.policy import Policy
from harness.gitrepo import Repo
from harness.state import SearchState, apply
from harness.tracks import STAGES, Track, run_seed
from harness.views import View
from ledger.errors import LedgerError
from ledger.measured import CalibrationMeasured
from ledger.records import Body
from ledger.store import Ledger

POLL_S = 0.05
EARLY_PART = 4  # a look at a breadth run on its way scores this part of the dev slice
SHORT_TOKENS = 1024  # scored by runs that only have to get through: preflight, timing

OnDone = Callable[[RunDone], None]


class Stopped(Exception):
    """The search ends here, resumable: by signal, or because a budget is spent. ``args[0]`` says why."""


@dataclass
class Budget:
    """When to stop starting things. ``trials`` counts decided trials of the whole search."""

    trials: int | None = None
    deadline: float | None = None  # unix seconds
    why_deadline: str = "budget.hours"
    keeps: int | None = None

    def spent(self, state: SearchState) -> str:
        """The reason to stop, "" if there is none."""
        if self.trials is not None and state.decided >= self.trials:
            return "budget.trials"
        if self.keeps is not None and len(state.standing) >= self.keeps:
            return "budget.keeps"
        if self.deadline is not None and time.time() >= self.deadline:
            return self.why_deadline
        return ""

    def words(self) -> str:
        """For people."""
        parts = [] if self.trials is None else [f"until {self.trials} trials are decided"]
        if self.keeps is not None:
            parts.append(f"until {self.keeps} are kept")
        if self.deadline is not None:
            parts.append("until " + time.strftime("%H:%M", time.localtime(self.deadline)))
        return ", ".join(parts) or "until stopped"


@dataclass
class Bench:
    """One search at work. All ledger writes go through :meth:`write`, on one thread."""

    search: str
    seed: int
    branch: str  # full ref name
    track: Track
    policy: Policy
    fingerprint: str
    repo: Repo
    ledger: Ledger
    executor: Executor
    view: View
    budget: Budget
    state: SearchState
    calibration: CalibrationMeasured | None = None  # of the noise, under this fingerprint
    mirror: Callable[[], object] = lambda: None  # store the ledger under its ref
    crash_point: Callable[[str], None] = field(default=lambda name: None)  # tests kill here
    filler: Callable[[], tuple[RunRequest, OnDone] | None] = field(default=lambda: None)  # work for an idle worker
    _idle: dict[Future[RunDone | RunFailed], OnDone] = field(default_factory=dict)  # filler runs under way
    _idle_ids: dict[Future[RunDone | RunFailed], str] = field(default_factory=dict)
    _interrupts: int = 0

    def write(self, type_: str, body: Body, trial: str = "") -> Any:
        """Append durably, fold into the state, show. Returns the record."""
        record = self.ledger.append(type_, body, search=self.search, trial=trial)
        apply(self.state, record)
        self.view.record(type_, trial, body)
        self.crash_point(f"after:{type_}")
        return record

    def publish(self) -> None:
        """Mirror the ledger under its ref. Failing is no reason to end a night: the file itself is the record."""
        try:
            self.mirror()
        except LedgerError as e:
            self.view.note(f"the ledger's copy in git is not up to date ({e}); tried again after the next trial")

    def seed_of(self, stage: str, k: int) -> int:
        """Seed of the k-th pair of a stage for the incumbent of today."""
        return run_seed(self.seed, stage, self.state.generation, k)

    def request(self, *, owner: str, stage: str, k: int, knobs: dict[str, Any], commit: str, files: dict[str, str],
                ) -> RunRequest:
        """A run of this search: steps, split and token budget follow from the stage."""
        steps = self.track.steps(stage) if stage in STAGES else self.track.timing_steps
        tokens = {"confirm": self.track.val_tokens, "breadth": self.track.dev_tokens}.get(stage, SHORT_TOKENS)
        knobs = {**knobs, "iterations": steps}
        generation = self.state.generation
        every = dev_every(self.policy, steps) if stage == "breadth" else 0
        return RunRequest(
            run_id=f"{self.search}-{owner}-{stage}-g{generation}-{k}-{self.fingerprint[:8]}", owner=owner, stage=stage,
            k=k, seed=self.seed_of(stage, k), knobs=knobs, commit=commit, files=files,
            split="val" if stage == "confirm" else "dev", max_tokens=tokens, dev_every=every,
            dev_tokens=self.track.dev_tokens // EARLY_PART if every else 0, fingerprint=self.fingerprint,
        )

    def wave(self, requests: Sequence[RunRequest], on_done: OnDone) -> list[RunFailed]:
        """Run all, call ``on_done`` for each as it finishes (that is where it is logged), return the failures.

        Workers that have nothing to do meanwhile are offered to ``filler``. A first interrupt lets the wave finish;
        a second ends its runs. Raises Stopped afterwards.
        """
        futures: dict[Future[RunDone | RunFailed], RunRequest] = {
            self.executor.submit(r, self.view.run_event): r for r in requests
        }
        self.fill(self.executor.workers - len(futures) - len(self._idle), {r.run_id for r in requests})
        failures: list[RunFailed] = []
        while futures:
            for future in wait([*futures, *self._idle], timeout=POLL_S, return_when=FIRST_COMPLETED).done:
                if future in self._idle:
                    self._settle_idle(future)
                    continue
                self.view.run_over(futures.pop(future))
                outcome = future.result()
                if isinstance(outcome, RunDone):
                    on_done(outcome)
                else:
                    failures.append(outcome)
        if any(f.kind == "stopped" for f in failures):
            raise Stopped("stopped")
        return failures

    def fill(self, free: int, busy: Collection[str] = ()) -> None:
        """Give ``free`` idle workers something useful, as far as there is anything and nobody has asked to stop.

        Runs ``busy`` (by id) are under way already: a run is never made twice at once.
        """
        while free > 0 and not self._interrupts:
            work = self.filler()
            if work is None:
                return
            if work[0].run_id not in busy and work[0].run_id not in self._idle_ids.values():
                future = self.executor.submit(work[0], self.view.run_event)
                self._idle[future], self._idle_ids[future] = work[1], work[0].run_id
                free -= 1

    def fill_idle(self) -> None:
        """Before the agent thinks: log what idle workers have finished, and give the free ones something."""
        for future in [f for f in self._idle if f.done()]:
            self._settle_idle(future)
        self.fill(self.executor.workers - len(self._idle))

    def _settle_idle(self, future: Future[RunDone | RunFailed]) -> None:
        """Log a filler run. One that failed is left out: the run is made again, in earnest, when it is needed."""
        on_done = self._idle.pop(future)
        del self._idle_ids[future]
        outcome = future.result()
        self.view.run_over(outcome.request)
        if isinstance(outcome, RunDone):
            on_done(outcome)

    def drain(self) -> None:
        """Wait for filler runs that are under way, and log them."""
        for future in list(self._idle):
            wait([future])
            self._settle_idle(future)

    def check_stop(self) -> None:
        """Raise Stopped if a person or the clock asked for it."""
        if self._interrupts:
            raise Stopped("stopped")
        reason = self.budget.spent(self.state)
        if reason and reason not in ("budget.trials", "budget.keeps"):
            raise Stopped(reason)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """First: finish the current runs, then stop. Second: end them now."""
        self._interrupts += 1
        if self._interrupts == 1:
            self.view.note("stopping after the current run (Ctrl-C again: stop now)")
        else:
            self.view.note("stopping now")
            self.executor.stop()

    def handle_signals(self) -> Callable[[], None]:
        """Install the handlers; returns what restores the old ones. A no-op off the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        old = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

        def restore() -> None:
            for s, handler in old.items():
                signal.signal(s, handler)

        return restore


def infra_stop(failures: Sequence[RunFailed]) -> None:
    """The incumbent's own runs must not fail: that is the machine, not an idea. Raises InfraError."""
    if failures:
        f = failures[0]
        raise InfraError(f"run {f.request.run_id} of the incumbent failed ({f.kind}): {f.detail}\n"
                         f"{f.log_tail.strip()[-1500:]}\nThe incumbent must run; mend this, then start the search "
                         "again: it resumes here.")
