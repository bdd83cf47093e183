"""How often does the demo's search find a true improvement? Measured over many search seeds.

    python -m benchmarks.demo_rate --searches 20

Every search is the real loop (garden, preflight, breadth, confirm, gate, commit) with real training runs,
each in a scratch clone of its own, from the plain recipe, until its first keep or ``--trials`` trials.
What is shared between searches, to make twenty of them affordable, is the runs: the k-th pair of a search
is mapped to one of ``--bank`` physical seeds by a permutation drawn from (search seed, stage), and a run
(knobs, physical seed) that another search has made is taken from the cache. Searches are therefore
correlated; the share of searches with a keep is unbiased, its spread is a little understated.

A keep is called *true* when its configuration beats the plain baseline on all bank seeds together: the paired
mean over the bank, minus two standard errors, above zero. Resumable: finished searches are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from harness.executor import EventSink, LocalExecutor, RunDone, RunFailed, RunRequest
from harness.gitrepo import open_repo
from harness.search import SearchOptions, run_search
from harness.tracks import environment, get_track, run_seed
from harness.views import PlainView
from harness.workspace import Workspace
from ledger.records import RunFigures
from trainer.knobs import REGISTRY

ROOT = Path(__file__).resolve().parent.parent


class Bank:
    """Runs by (stage, knobs, physical seed), on disk."""

    def __init__(self, folder: Path, size: int, code: str) -> None:
        self.folder, self.size, self.code = folder, size, code
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, request: RunRequest, seed: int) -> Path:
        text = json.dumps([self.code, request.stage, sorted(request.knobs.items()), seed, request.max_tokens])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def physical(self, search_seed: int, stage: str, k: int) -> int:
        """The k-th pair's bank seed: a permutation per search and stage, so that pairs never collide."""
        order = list(range(self.size))
        random.Random(f"{search_seed}:{stage}").shuffle(order)
        return run_seed(0, f"bank-{stage}", 0, order[k % self.size])


def cached(bank: Bank, search_seed: int) -> type[LocalExecutor]:
    """A LocalExecutor that looks into the bank first."""

    class CachedExecutor(LocalExecutor):
        def submit(self, request: RunRequest, sink: EventSink) -> Future[RunDone | RunFailed]:
            seed = bank.physical(search_seed, request.stage, request.k)
            path = bank.key(request, seed)
            future: Future[RunDone | RunFailed] = Future()
            if path.exists():
                figures = msgspec.json.decode(path.read_bytes(), type=RunFigures)
                figures = msgspec.structs.replace(figures, run_id=request.run_id, k=request.k, seed=request.seed)
                future.set_result(RunDone(request=request, figures=figures))
                return future
            real = dataclasses.replace(request, seed=seed)
            inner = super().submit(real, sink)

            def done(f: Future[RunDone | RunFailed]) -> None:
                outcome = f.result()
                if isinstance(outcome, RunDone):
                    tmp = path.with_suffix(".tmp")
                    tmp.write_bytes(msgspec.json.encode(outcome.figures))
                    tmp.replace(path)
                    figures = msgspec.structs.replace(outcome.figures, seed=request.seed)
                    future.set_result(RunDone(request=request, figures=figures))
                else:
                    future.set_result(dataclasses.replace(outcome, request=request))

            inner.add_done_callback(done)
            return future

    return CachedExecutor


def scratch(folder: Path, commit: str) -> Workspace:
    """A clone of one commit without recipe and ledger, as the demo makes it."""
    from harness.demo import _plain

    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", "--no-tags", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "reset", "-q", "--hard", commit], cwd=folder, check=True)
    _plain(folder)
    return Workspace(root=folder, main=folder)


def one_search(seed: int, args: argparse.Namespace, bank: Bank) -> dict[str, Any]:
    """Run one search to its first keep and describe it."""
    import harness.search as module

    ws = scratch(args.work / "clone", args.commit)
    module.require_own_code = lambda ws: None  # type: ignore[assignment]  # the clone is this very commit
    begin = time.monotonic()
    outcome = run_search(ws, SearchOptions(track=args.track, seed=seed, trials=args.trials, keeps=1), PlainView(),
                         make_executor=cached(bank, seed))
    trials = [
        {"change": dict(t.proposed.change), "reason": t.reason,
         "delta_bpb": t.decided.delta_bpb if t.decided else None,
         "pairs": t.decided.looks[-1].n if t.decided and t.decided.looks else 0}
        for t in outcome.state.trials.values()
    ]
    kept = [outcome.state.trials[t] for t in outcome.state.kept]
    return {"seed": seed, "trials": trials, "kept": [dict(t.proposed.change) for t in kept],
            "seconds_with_cache": round(time.monotonic() - begin, 1)}


def judge(changes: list[dict[str, Any]], args: argparse.Namespace, bank: Bank) -> list[dict[str, Any]]:
    """Paired difference to the plain baseline over the whole bank, for every kept configuration."""
    track = get_track(args.track)
    ws = scratch(args.work / "clone", args.commit)
    from harness.data import ensure_data

    repo = open_repo(ws.root)
    head = repo.rev("HEAD")
    assert head
    data, _ = ensure_data(ws, track, print)
    executor = cached(bank, 0)(repo=repo, track=track, data_dir=data, runs=ws.runs, slots=ws.slots, pinned=head)

    def runs(knobs: dict[str, Any]) -> list[float]:
        knobs = {**knobs, "iterations": track.confirm_steps}
        futures = [executor.submit(RunRequest(
            run_id=f"bank-{REGISTRY.config_hash(knobs)[:12]}-{k}", owner="bank", stage="confirm", k=k, seed=k,
            knobs=knobs, commit=head, split="val", max_tokens=track.val_tokens), lambda r, e: None)
            for k in range(bank.size)]
        done = [f.result() for f in futures]
        return [d.figures.val_bpb for d in done if isinstance(d, RunDone)]

    base = runs(track.resolve({}))
    out = []
    for change in changes:
        values = runs(track.resolve({}, change))
        diffs = [x - b for x, b in zip(values, base, strict=True)]
        mean, se = statistics.mean(diffs), statistics.stdev(diffs) / len(diffs) ** 0.5
        out.append({"change": change, "delta_bpb": mean, "se": se, "true": mean + 2 * se < 0})
    executor.close()
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="first search seed")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--track", default="pocket")
    parser.add_argument("--commit", default="HEAD", help="what is measured")
    parser.add_argument("--bank", type=int, default=8, help="physical seeds per stage")
    parser.add_argument("--work", type=Path, default=ROOT / ".autoresearch" / "demo-rate")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo_rate.json")
    args = parser.parse_args()
    repo = open_repo(ROOT)
    args.commit = repo.rev(args.commit) or parser.error(f"--commit {args.commit}: no such commit")
    bank = Bank(args.work / "bank", args.bank, repo.code_tree(args.commit))
    args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"searches": []}
    done = {s["seed"] for s in found["searches"]}
    for seed in range(args.first, args.first + args.searches):
        if seed not in done:
            found["searches"].append(one_search(seed, args, bank))
            args.out.write_text(json.dumps(found, indent=1))
    kept = {json.dumps(k, sort_keys=True) for s in found["searches"] for k in s["kept"]}
    changes = [json.loads(c) for c in sorted(kept)]
    found["kept_configurations"] = judge(changes, args, bank)
    truth = {json.dumps(c["change"], sort_keys=True): c["true"] for c in found["kept_configurations"]}
    hits = sum(any(truth[json.dumps(k, sort_keys=True)] for k in s["kept"]) for s in found["searches"])
    false = sum(not truth[json.dumps(k, sort_keys=True)] for s in found["searches"] for k in s["kept"])
    n = len(found["searches"])
    found["summary"] = {
        "searches": n, "with_true_keep": hits, "share": hits / n, "false_keeps": false, "trials_at_most": args.trials,
        "bank": args.bank, "track": args.track, "commit": args.commit,
        "cpu": environment(get_track(args.track)),
        "command": "python -m benchmarks.demo_rate " + " ".join(sys.argv[1:]),
    }
    args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found["summary"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
