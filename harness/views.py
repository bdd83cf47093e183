"""What a person sees while a search runs: a live panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.executor import RunRequest
from harness.output import say
from harness.transaction import change_text
from ledger.measured import HonestMeasured, TimingMeasured, TrialReverted
from ledger.records import (
    CommitDone,
    ControlEnded,
    Decided,
    PreflightPassed,
    PreflightRefused,
    StageEnded,
    TrialFailed,
    TrialProposed,
)

VERDICT_STYLE = {"keep": "bold green", "reject": "yellow", "failed": "red", "refused": "dim"}


@dataclass
class RunView:
    """Progress of one run."""

    request: RunRequest
    begin: float = field(default_factory=time.monotonic)
    phase: str = "start"
    done: int = 0
    of: int = 0
    loss: float | None = None

    @property
    def title(self) -> str:
        """``pocket-0003 confirm #1``"""
        return f"{self.request.owner} {self.request.stage} #{self.request.k}"

    def update(self, event: dict[str, Any]) -> None:
        """Fold one event of the run's stream."""
        kind = event.get("kind")
        if kind == "step":
            self.phase, self.done, self.of = "train", int(event.get("step", 0)), int(event.get("of", 0))
            self.loss = event.get("train_loss")
        elif kind == "score":
            self.phase, self.done, self.of = "score", int(event.get("done", 0)), int(event.get("of", 0))
        elif kind == "phase":
            self.phase = str(event.get("name", ""))


@dataclass
class Status:
    """The figures of the header, kept by the loop."""

    search: str = ""
    track: str = ""
    budget: str = ""
    decided: int = 0
    target: int | None = None
    kept: int = 0
    best_bpb: float | None = None
    baseline_bpb: float | None = None
    doing: str = ""
    begin: float = field(default_factory=time.monotonic)


class View(Protocol):
    """Everything the loop tells a person. Calls come from one thread, except ``run_event``."""

    status: Status

    def __enter__(self) -> View: ...
    def __exit__(self, *exc: object) -> None: ...
    def run_event(self, request: RunRequest, event: dict[str, Any]) -> None: ...
    def run_over(self, request: RunRequest) -> None: ...
    def record(self, type_: str, trial: str, body: Any) -> None: ...
    def note(self, text: str) -> None: ...


def describe(type_: str, trial: str, body: Any) -> tuple[str, str] | None:
    """(line, style) for a ledger record worth a person's attention, else None."""
    if isinstance(body, TrialProposed):
        return f"{trial} proposes {change_text(body.change, body.previous)}  [{body.line}]", "cyan"
    if isinstance(body, ControlEnded):
        return (f"control {body.stage} #{body.run.k}: {body.run.val_bpb:.4f} bpb, "
                f"{body.run.wall_seconds:.0f} s"), "dim"
    if isinstance(body, PreflightPassed):
        return (f"{trial} preflight passed: predicted {body.predicted_bytes:,} of {body.cap_bytes:,} bytes, "
                f"{body.step_ms:.0f} ms a step"), "dim"
    if isinstance(body, StageEnded):
        return (f"{trial} {type_.partition('.')[0]} #{body.run.k}: {body.run.val_bpb:.4f} bpb, "
                f"{body.run.wall_seconds:.0f} s"), "dim"
    if isinstance(body, PreflightRefused):
        return f"{trial} refused: {body.reason}: {body.detail}", VERDICT_STYLE["refused"]
    if isinstance(body, Decided):
        gain = "" if body.delta_bpb is None else f" ({body.delta_bpb:+.4f} bpb)"
        return f"{trial} {body.verdict.upper()} {body.reason}{gain}", VERDICT_STYLE[body.verdict]
    if isinstance(body, TrialFailed):
        return f"{trial} failed: {body.reason}: {body.detail}", VERDICT_STYLE["failed"]
    if isinstance(body, CommitDone):
        return f"{trial} committed as {body.sha[:12]} on {body.branch.removeprefix('refs/heads/')}", "green"
    return _describe_after(trial, body)


def _describe_after(trial: str, body: Any) -> tuple[str, str] | None:
    """What became of a keep, and measurements beside the runs."""
    if isinstance(body, HonestMeasured):
        word = {"stand": "stands", "extend": "is measured on more seeds", "revert": "is taken back"}[body.decision]
        return (f"{trial} on {len(body.ks)} fresh seeds: gain {body.gain:+.4f} +- {body.se:.4f} bpb (claimed "
                f"{body.claimed:+.4f}): it {word}"), "green" if body.decision == "stand" else "yellow"
    if isinstance(body, TrialReverted):
        return f"{trial} reverted by {body.sha[:12]}", "yellow"
    if isinstance(body, TimingMeasured):
        turns = ", ".join(f"{c:.3g} -> {x:.3g}" for c, x in body.pairs)
        return f"{trial} step ms, taking turns: {turns}", "dim"
    return None


class PlainView:
    """One line per thing worth knowing; for pipes, logs and CI. A reader who goes away stops nothing.

    Lines are written without rich's help, whose Console ends the process on a broken pipe.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self.status = Status()
        self._out = out or sys.stdout
        self._heard = True
        self._lines: deque[str] = deque()
        self._writing = threading.Lock()  # events of several runs arrive from their own threads
        self._quarter: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    def _print(self, text: str) -> None:
        elapsed = time.monotonic() - self.status.begin
        self._lines.append(Text(f"[{elapsed:6.1f}s] {text}").plain)
        # Never waits: a signal's handler may come here in the middle of a write of the same thread, and whoever
        # is writing takes the line with him.
        while self._lines and self._writing.acquire(blocking=False):
            try:
                while self._lines:
                    line = self._lines.popleft()
                    self._heard = self._heard and say(line, self._out)
            finally:
                self._writing.release()

    def run_event(self, request: RunRequest, event: dict[str, Any]) -> None:
        run = RunView(request)
        run.update(event)
        if run.phase != "train" or not run.of or run.loss is None:
            return
        now = ("train", run.done * 2 // run.of)
        if now[1] and now != self._quarter.get(request.run_id):
            self._quarter[request.run_id] = now
            self._print(f"  {run.title}: step {run.done}/{run.of}, loss {run.loss:.4f}")

    def run_over(self, request: RunRequest) -> None:
        self._quarter.pop(request.run_id, None)

    def record(self, type_: str, trial: str, body: Any) -> None:
        line = describe(type_, trial, body)
        if line:
            self._print(line[0])

    def note(self, text: str) -> None:
        self._print(text)


class LiveView:
    """A panel that refreshes in place; readable at 80 columns."""

    def __init__(self, console: Console | None = None, log_lines: int = 8) -> None:
        self.status = Status()
        self.console = console or Console()
        self._runs: dict[str, RunView] = {}
        self._log: deque[tuple[str, str]] = deque(maxlen=log_lines)
        self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self.render, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may have gone: the verdicts stand
            self._live.stop()

    def run_event(self, request: RunRequest, event: dict[str, Any]) -> None:
        self._runs.setdefault(request.run_id, RunView(request)).update(event)

    def run_over(self, request: RunRequest) -> None:
        self._runs.pop(request.run_id, None)

    def record(self, type_: str, trial: str, body: Any) -> None:
        line = describe(type_, trial, body)
        if line:
            self._log.append(line)

    def note(self, text: str) -> None:
        self._log.append((text, "magenta"))

    def render(self) -> RenderableType:
        """The whole panel as it stands (called by rich's refresh thread)."""
        s = self.status
        elapsed = time.monotonic() - s.begin
        head = Table.grid(padding=(0, 2))
        of = f"/{s.target}" if s.target is not None else ""
        head.add_row(f"[b]{s.search}[/b] on {s.track}", f"trials {s.decided}{of}", f"kept {s.kept}",
                     f"{elapsed / 60:.1f} min", Text(s.budget, style="dim"))
        best = Text()
        if s.best_bpb is not None:
            best.append(f"incumbent {s.best_bpb:.4f} bpb", style="bold")
            if s.baseline_bpb is not None and s.baseline_bpb != s.best_bpb:
                best.append(f"  (plain baseline {s.baseline_bpb:.4f})", style="dim")
        runs = Table.grid(padding=(0, 1), expand=True)
        runs.add_column(ratio=3, no_wrap=True, overflow="ellipsis")
        runs.add_column(width=6)
        runs.add_column(ratio=3)
        runs.add_column(justify="right", width=20, no_wrap=True)
        for run in sorted(self._runs.values(), key=lambda r: r.title):
            loss = f"loss {run.loss:.3f}  " if run.loss is not None else ""
            count = f"{run.done}/{run.of}" if run.of else f"{time.monotonic() - run.begin:.0f} s"
            runs.add_row(run.title, Text(run.phase, style="blue"),
                         ProgressBar(total=max(run.of, 1), completed=run.done), f"{loss}{count}")
        log = [Text(t, style=style, no_wrap=True, overflow="ellipsis") for t, style in list(self._log)]
        doing = Text(s.doing, style="italic")
        return Panel(Group(head, best, Text(), doing, runs, Text(), *log), title="autoresearch", border_style="blue",
                     subtitle="Ctrl-C once: finish this run and stop; twice: stop now")


def make_view(plain: bool = False) -> View:
    """LiveView on a terminal, PlainView elsewhere."""
    if plain or sys.stdout is None or not sys.stdout.isatty():
        return PlainView()
    return LiveView()
