"""Real runs for judging the gate itself: many seeds of known edits on the pocket track.

    python -m benchmarks.gate_runs --runs gate_runs.jsonl [--hours 1.5]     # resumable: runs what is missing
    python -m benchmarks.gate_runs --runs gate_runs.jsonl --check 4         # equal to runs made one process each?

Every row is one run: the trainer's own ``train``, then the referee's own ``score``, on the files that a search
would write. To afford many, two processes stay warm (torch imported once) and serve one run after another;
``--check`` repeats some of them with a process each and compares bits. Rows are appended and fsynced as runs end,
so that the program can be killed at any time. What is made of the rows: ``benchmarks.gate_real``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.data import ensure_data
from harness.runner import child_env
from harness.tracks import Track, environment, get_track
from harness.workspace import Workspace
from trainer.contract import (
    ARTIFACT_FILE,
    EVENTS_FILE,
    RESULT_FILE,
    SCORE_FILE,
    RunResult,
    RunSpec,
    ScoreResult,
    ScoreSpec,
    dump,
    load,
)
from trainer.knobs import KnobValue
from trainer.tree import tree_hash

ROOT = Path(__file__).resolve().parent.parent
BASE, NULL = "base", "null"
SEED_OF_K = 7_000_000  # seeds of the campaign, far from those that a search draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One configuration of the campaign. ``kind``: base | null | gain | harm | size | length."""

    name: str
    kind: str
    knobs: Mapping[str, KnobValue] = dataclasses.field(default_factory=dict)
    steps: int = 0  # confirm steps; 0 = the track's
    seeds: int = 24
    breadth_seeds: int = 0


def configs() -> list[Config]:
    """The campaign. Signs were guessed from earlier two-seed runs; what is true is what 16 and more seeds say."""
    def edit(name: str, kind: str, seeds: int = 24, **knobs: KnobValue) -> Config:
        return Config(name=name, kind=kind, knobs=knobs, seeds=seeds, breadth_seeds=4)

    out = [
        Config(name=BASE, kind="base", seeds=64, breadth_seeds=4),
        # An edit too small to matter, large enough to change every bit: what a null edit looks like when paired.
        Config(name=NULL, kind="null", knobs={"matrix_lr": 0.04 * (1 + 1e-6)}, seeds=8, breadth_seeds=4),
        Config(name="steps+2", kind="gain", steps=122), Config(name="steps+6", kind="gain", steps=126),
        Config(name="steps+12", kind="gain", steps=132),
        edit("warmdown-0.08", "gain", warmdown_frac=0.08), edit("warmdown-0.15", "gain", 8, warmdown_frac=0.15),
        edit("momentum-0.94", "gain", muon_momentum=0.94), edit("momentum-0.9", "gain", muon_momentum=0.9),
        edit("matrix-lr-0.035", "gain", matrix_lr=0.035), edit("embed-lr-0.045", "gain", tied_embed_lr=0.045),
        edit("embed-std-0.02", "gain", tied_embed_init_std=0.02), edit("resid-norm", "gain", resid_norm=True),
        Config(name="steps-2", kind="harm", steps=118), Config(name="steps-6", kind="harm", steps=114),
        Config(name="steps-12", kind="harm", steps=108),
        edit("beta2-0.99", "harm", beta2=0.99), edit("qk-gain-4", "harm", qk_gain_init=4.0),
        edit("neg-slope-0.5", "harm", mlp_neg_slope=0.5), edit("momentum-0.96", "harm", muon_momentum=0.96),
        edit("momentum-0.97", "harm", muon_momentum=0.97), edit("matrix-lr-0.045", "harm", matrix_lr=0.045),
        edit("embed-lr-0.055", "harm", tied_embed_lr=0.055), edit("embed-lr-0.1", "harm", tied_embed_lr=0.1),
    ]
    out += [Config(name=f"dim-{d}", kind="size", knobs={"model_dim": d}, seeds=6, breadth_seeds=4)
            for d in (112, 120, 136, 144)]
    out += [Config(name=f"layers-{n}", kind="size", knobs={"num_layers": n}, seeds=6, breadth_seeds=4) for n in (4, 6)]
    out += [Config(name=f"length-{n}", kind="length", steps=n, seeds=2) for n in (30, 60, 240, 480, 960)]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run to be made."""

    config: Config
    stage: str  # confirm | breadth-STEPS
    k: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.config.name, self.stage, self.k

    def steps(self, track: Track) -> int:
        if self.stage == "confirm":
            return self.config.steps or track.confirm_steps
        return int(self.stage.removeprefix("breadth-"))


BREADTH = (60, 30, 90)  # lengths of the panel, the most wanted first


def jobs() -> Iterator[Job]:
    """In an order that makes a campaign cut short useful: seeds in blocks, every configuration in each block."""
    everything = configs()

    def breadth(steps: int) -> Iterator[Job]:
        for k in range(4):
            yield from (Job(config=c, stage=f"breadth-{steps}", k=k) for c in everything if k < c.breadth_seeds)

    for i, block in enumerate((range(8), range(8, 16), range(16, 24), range(24, 64))):
        for k in block:
            yield from (Job(config=c, stage="confirm", k=k) for c in everything if k < c.seeds)
        if i < len(BREADTH) - 1:
            yield from breadth(BREADTH[i])
    yield from breadth(BREADTH[-1])


def specs(job: Job, track: Track, data: Path, out: Path) -> tuple[RunSpec, dict[str, Any]]:
    """The RunSpec and the ScoreSpec's fields but the artifact's hash."""
    knobs = track.resolve({}, job.config.knobs)
    steps = job.steps(track)
    knobs["iterations"] = steps
    breadth = job.stage != "confirm"
    run = RunSpec(
        run_id="-".join(map(str, job.key)), seed=SEED_OF_K + job.k + (1000 if breadth else 0), knobs=knobs,
        data_dir=str(data), out_dir=str(out), device=track.device, threads=track.threads,
        deterministic=track.deterministic, dev_every=max(1, steps // 4) if breadth else 0, dev_tokens=16384)
    score = {
        "run_id": run.run_id, "artifact_path": str(out / ARTIFACT_FILE), "data_dir": str(data), "out_dir": str(out),
        "split": "dev" if breadth else "val", "max_tokens": track.dev_tokens if breadth else track.val_tokens,
        "seq_len": int(knobs["train_seq_len"]), "device": track.device, "threads": track.threads}
    return run, score


def row(job: Job, out: Path, seconds: float) -> dict[str, Any]:
    """What is kept of a finished run."""
    result, score = load(RunResult, out / RESULT_FILE), load(ScoreResult, out / SCORE_FILE)
    events = [json.loads(line) for line in (out / EVENTS_FILE).read_text().splitlines()]
    return {
        "config": job.config.name, "stage": job.stage, "k": job.k, "seed": result.seed, "steps": result.steps,
        "val_bpb": score.val_bpb, "split": score.split, "artifact_bytes": result.artifact_bytes,
        "artifact_sha256": result.artifact_sha256, "code_bytes": result.code_bytes,
        "payload_bytes": result.payload_bytes, "params": result.params, "step_ms": result.step_ms,
        "train_loss": result.final_train_loss,
        "dev": [[e["step"], e["dev_loss"]] for e in events if e["kind"] == "dev"],
        "data": score.data_fingerprint, "evaluator": score.evaluator_hash, "tree": result.tree_hash,
        "seconds": round(seconds, 2),
    }


WORKER = """
import json, sys, time
from pathlib import Path
from trainer.__main__ import main
for line in sys.stdin:
    what, path = json.loads(line)
    print(json.dumps(main([what, path])), flush=True)
"""


class Worker:
    """A warm trainer process: takes (command, spec file), answers with the exit code."""

    def __init__(self, track: Track, home: Path) -> None:
        env = child_env(ROOT, track.threads, home)
        self.process = subprocess.Popen([sys.executable, "-P", "-c", WORKER], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=env, cwd=home)

    def call(self, what: str, path: Path) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([what, str(path)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the trainer died at {path} (exit {self.process.wait()})")
        return int(answer)


def make(job: Job, track: Track, data: Path, out: Path, call: Any) -> dict[str, Any]:
    """Train and score one job in ``out`` through ``call(command, spec file) -> exit code``."""
    begin = time.monotonic()
    run, score = specs(job, track, data, out)
    dump(run, out / "spec.json")
    code = call("train", out / "spec.json")
    if code:
        raise RuntimeError(f"{job.key}: train exited {code}: {(out / RESULT_FILE).read_text()[:500]}")
    result = load(RunResult, out / RESULT_FILE)
    dump(ScoreSpec(**score, artifact_sha256=result.artifact_sha256), out / "score_spec.json")
    code = call("score", out / "score_spec.json")
    if code:
        raise RuntimeError(f"{job.key}: score exited {code}: {(out / SCORE_FILE).read_text()[:500]}")
    return row(job, out, time.monotonic() - begin)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far; a torn last line is dropped, its run will be made again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def campaign(path: Path, hours: float, workers: int) -> None:
    """Make the missing runs."""
    track = get_track("pocket")
    data, _ = ensure_data(Workspace(root=ROOT, main=ROOT), track, print)
    done = {(r["config"], r["stage"], r["k"]) for r in read(path)}
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    waiting = [j for j in jobs() if j.key not in done]
    for job in waiting:
        todo.put(job)
    print(f"{len(done)} runs are there, {len(waiting)} to make", flush=True)
    end, lock, begin = time.time() + 3600 * hours, threading.Lock(), time.time()
    made = 0

    def work() -> None:
        nonlocal made
        with tempfile.TemporaryDirectory() as home:
            worker = Worker(track, Path(home))
            while time.time() < end:
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    break
                with tempfile.TemporaryDirectory(dir=home) as folder:
                    result = make(job, track, data, Path(folder), worker.call)
                with lock, path.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(result) + "\n")
                    f.flush()
                    os.fsync(f.fileno())
                    made += 1
                    if made % 10 == 0:
                        print(f"{made} of {len(waiting)} runs, {(time.time() - begin) / made:.1f} s each", flush=True)
            worker.process.stdin.close()  # type: ignore[union-attr]
            worker.process.wait()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def check(path: Path, count: int) -> int:
    """Repeat ``count`` rows with a process for each command; returns how many differ in a bit."""
    track = get_track("pocket")
    data, _ = ensure_data(Workspace(root=ROOT, main=ROOT), track, print)
    rows = {(r["config"], r["stage"], r["k"]): r for r in read(path)}
    chosen = [j for j in jobs() if j.key in rows]
    bad = 0
    for job in chosen[:: max(1, len(chosen) // count)][:count]:
        with tempfile.TemporaryDirectory() as home:
            def call(what: str, spec: Path, home: str = home) -> int:
                return subprocess.run([sys.executable, "-P", "-m", "trainer", what, str(spec)], cwd=home,
                                      env=child_env(ROOT, track.threads, Path(home))).returncode

            again, old = make(job, track, data, Path(home), call), rows[job.key]
        differ = [n for n in ("artifact_sha256", "train_loss", "dev", "val_bpb") if again[n] != old[n]]
        bad += bool(differ)
        print(f"{job.key}: {'differs in ' + ', '.join(differ) if differ else 'equal'} ({old['val_bpb']!r}, "
              f"{again['val_bpb']!r})", flush=True)
    return bad


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks/results/gate_runs.jsonl", help="rows so far")
    parser.add_argument("--hours", type=float, default=24.0, help="start no run after so many hours")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", type=int, metavar="N", help="repeat N rows with a process each instead")
    args = parser.parse_args(argv)
    print(json.dumps({"tree": tree_hash(), "environment": environment(get_track("pocket"))}), flush=True)
    if args.check:
        return 1 if check(args.runs, args.check) else 0
    campaign(args.runs, args.hours, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
