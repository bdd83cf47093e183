"""An in-process executor over a made-up world: the loop's own logic without torch, in milliseconds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

from msgspec import structs

from harness.executor import EventSink, LocalExecutor, RunDone, RunFailed, RunRequest
from harness.views import PlainView
from ledger.records import RunFigures


class Killed(BaseException):
    """Stands for SIGKILL at a point of the loop: nothing after it is executed by the loop."""


def unit(*parts: object) -> float:
    """A number in (-1, 1) that depends on the parts alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**63 - 1.0


def bowl_world(request: RunRequest) -> float:
    """val_bpb: a smooth bowl in a few knobs, the same luck for both sides of a pair, a little luck of its own."""
    k = request.knobs
    bowl = 0.02 * math.log2(float(k["matrix_lr"]) / 0.015) ** 2 + 0.05 * (1 - float(k["warmdown_frac"])) ** 2
    own = 0.0015 * unit("own", request.seed, sorted(k.items()))
    return 2.4 + bowl + 0.02 * unit("seed", request.seed) + own


class FakeExecutor(LocalExecutor):
    """LocalExecutor without processes and worktrees. Class attributes steer it from a test."""

    world: ClassVar[Callable[[RunRequest], float]] = staticmethod(bowl_world)
    fails: ClassVar[Callable[[RunRequest], RunFailed | None]] = staticmethod(lambda request: None)
    dev: ClassVar[Callable[[RunRequest], list[list[float]]]] = staticmethod(lambda request: [])  # [step, dev loss]
    step_ms: ClassVar[Callable[[RunRequest], float]] = staticmethod(lambda request: 10.0)
    calls: ClassVar[list[RunRequest]] = []
    die_before: ClassVar[int | None] = None  # raise Killed instead of the n-th run from now

    def __init__(self, *, repo: Any, track: Any, data_dir: Path, runs: Path, slots: Path, pinned: str) -> None:
        self.workers = track.workers
        self.evaluator_hash = "e" * 64
        self.stopped = False

    @classmethod
    def reset(cls) -> None:
        cls.world, cls.fails = staticmethod(bowl_world), staticmethod(lambda request: None)
        cls.step_ms = staticmethod(lambda request: 10.0)
        cls.dev, cls.calls, cls.die_before = staticmethod(lambda request: []), [], None

    def submit(self, request: RunRequest, sink: EventSink) -> Future[RunDone | RunFailed]:
        cls = type(self)
        if cls.die_before is not None:
            if cls.die_before == 0:
                raise Killed
            cls.die_before -= 1
        cls.calls.append(request)
        future: Future[RunDone | RunFailed] = Future()
        outcome = cls.fails(request)
        dev = cls.dev(request) if request.dev_every else []
        for step, loss in dev if outcome is None and request.watch else []:
            why = request.watch({"kind": "dev", "step": step, "dev_loss": loss})  # type: ignore[misc]
            if why:
                outcome = RunFailed(request=request, kind="given-up", detail=why)
                break
        if outcome is None and request.watch and (why := request.watch({"kind": "step"})):
            outcome = RunFailed(request=request, kind="given-up", detail=why)
        future.set_result(outcome or RunDone(
            request=request, figures=structs.replace(
                fake_figures(request, cls.world(request)), dev=dev, step_ms=cls.step_ms(request))))
        return future

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        return


def fake_figures(request: RunRequest, bpb: float) -> RunFigures:
    """Figures such as a real run would leave."""
    params = 100 * int(request.knobs["model_dim"]) * int(request.knobs["num_layers"])
    return RunFigures(
        run_id=request.run_id, seed=request.seed, k=request.k, val_bpb=bpb, val_loss=bpb * 1.6,
        artifact_bytes=params * 7 // 8, code_bytes=20_000,
        artifact_sha256=hashlib.sha256(repr(bpb).encode()).hexdigest(),
        train_seconds=1.0, eval_seconds=0.1, wall_seconds=1.5, step_ms=10.0, steps=int(request.knobs["iterations"]),
        tokens=1000, params=params, peak_memory_bytes=10**8, final_train_loss=4.0, split=request.split,
        eval_tokens=1024, eval_bytes=2400, tree_hash="t" * 64, evaluator_hash="e" * 64, data_fingerprint="d" * 64,
    )


class SilentView(PlainView):
    """Collects instead of printing."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def _print(self, text: str) -> None:
        self.lines.append(text)
