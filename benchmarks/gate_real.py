"""The gate on real runs: does it keep what 16 and more fresh seeds say is real?

    python -m benchmarks.gate_real [--runs FILE] [--plot DIR] [--json FILE]

Reads the rows that ``benchmarks.gate_runs`` made (real training, real referee) and puts them through the gate's own
functions (``breadth_verdict``, ``confirm_step``), many times with other seeds drawn:

*Null tests.* (a) Seed nulls: candidate and control are the plain baseline on different seeds, all drawn anew from the
bank of 64 each time. That is the noisiest null there is, because nothing is shared by a pair. (b) Centred nulls: a real
edit's same-seed differences with their mean taken off, so that the noise is an edit's own and the gain is exactly zero.
*Planted gains and harms.* Each trial draws the gate's seeds and, from the others, 16 for the truth.
*Panel.* Kendall's tau between breadth and confirm, and what breadth's veto and an early stop kill.
*Prices.* bpb for 1% of steps, bpb for a megabyte, and how an artifact grows when the model is trained for longer.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.gate_runs import BASE, BREADTH, NULL, ROOT, Config, configs, read
from harness.gate.correlation import kendall, proportion
from harness.gate.noise import Noise, pool, shipped
from harness.gate.policy import Policy, load_policy
from harness.gate.verdict import Facts, breadth_verdict, confirm_step
from harness.tracks import get_track
from ledger.records import RunFigures

TRUTH = 16  # fresh seeds behind every "true" gain
Rows = dict[tuple[str, str], dict[int, dict[str, Any]]]


def load(path: Path) -> Rows:
    """(configuration, stage) -> k -> row."""
    out: Rows = {}
    for r in read(path):
        out.setdefault((r["config"], r["stage"]), {})[r["k"]] = r
    return out


def figures(row: dict[str, Any], k: int, seed: int, side: str) -> RunFigures:
    """A row as the gate takes it, at place ``k`` of a trial's seed list."""
    return RunFigures(
        run_id=f"{side}{k}", seed=seed, k=k, val_bpb=row["val_bpb"], val_loss=row["val_bpb"],
        artifact_bytes=row["artifact_bytes"], code_bytes=row["code_bytes"], artifact_sha256=row["artifact_sha256"],
        train_seconds=1.0, eval_seconds=1.0, wall_seconds=row["seconds"], step_ms=100.0, steps=row["steps"], tokens=1,
        params=row["params"], peak_memory_bytes=1, final_train_loss=row["train_loss"], split=row["split"],
        eval_tokens=1, eval_bytes=1, tree_hash=side, evaluator_hash=row["evaluator"], data_fingerprint=row["data"],
        payload_bytes=row["payload_bytes"])


class Trial:
    """One trial of an edit through the gate, on rows drawn for it. Step times are left out: all 100 ms."""

    def __init__(self, policy: Policy, noise: Noise, cap: int) -> None:
        self.policy, self.noise, self.cap = policy, noise, cap

    def confirm(self, control: Sequence[dict[str, Any]], candidate: Sequence[dict[str, Any]]) -> tuple[str, int, float]:
        """(reason, pairs used, claimed gain), taking looks as a search does."""
        for n in self.policy.looks:
            decided = confirm_step(
                self.policy, [figures(r, k, k, "c") for k, r in enumerate(control[:n])],
                [figures(r, k, k, "x") for k, r in enumerate(candidate[:n])], self.noise,
                Facts(cap_bytes=self.cap, timing=[[100.0, 100.0]] * self.policy.timing_pairs))
            if decided.verdict != "continue":
                return decided.reason, n, -(decided.delta_bpb or 0.0)
        raise AssertionError("the last look decides")

    def passes_breadth(self, control: Sequence[dict[str, Any]], candidate: Sequence[dict[str, Any]]) -> bool:
        """Whether breadth promotes."""
        n = self.policy.breadth_pairs
        return breadth_verdict(
            self.policy, [figures(r, k, k, "c") for k, r in enumerate(control[:n])],
            [figures(r, k, k, "x") for k, r in enumerate(candidate[:n])], self.noise).decision == "promote"


def paired(rows: Rows, name: str, stage: str = "confirm") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(baseline's row, edit's row) over their common seeds."""
    base, mine = rows.get((BASE, stage), {}), rows.get((name, stage), {})
    return [(base[k], mine[k]) for k in sorted(mine) if k in base]


def gains(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    """Same-seed gains, bpb, positive = the edit is better."""
    return [a["val_bpb"] - b["val_bpb"] for a, b in pairs]


def edits(rows: Rows, least: int) -> list[Config]:
    """Gains and harms with at least ``least`` pairs."""
    return [c for c in configs() if c.kind in ("gain", "harm") and len(paired(rows, c.name)) >= least]


def measured_noise(policy: Policy, rows: Rows) -> Noise:
    """The pool as a ledger would have it after some trials: four pairs of each of the campaign's edits."""
    groups = []
    for c in edits(rows, 4):
        some = paired(rows, c.name)[:4]
        groups.append(([a["val_bpb"] for a, _ in some], [b["val_bpb"] for _, b in some]))
    return pool(policy, groups)


def noise_table(rows: Rows) -> list[dict[str, Any]]:
    """True gain and noise of every configuration."""
    out = []
    for c in configs():
        g = gains(paired(rows, c.name)) if c.name != BASE else [r["val_bpb"] for r in rows[BASE, "confirm"].values()]
        if len(g) > 1:
            out.append({"config": c.name, "kind": c.kind, "n": len(g), "mean": fmean(g), "sd": stdev(g),
                        "se": stdev(g) / math.sqrt(len(g))})
    return out


def seed_nulls(trial: Trial, rows: Rows, tests: int, rng: random.Random) -> dict[str, Any]:
    """Baseline against baseline on other seeds, candidate and control bank drawn anew for every test."""
    bank, n = list(rows[BASE, "confirm"].values()), trial.policy.max_pairs
    kept = used = 0
    for _ in range(tests):
        drawn = rng.sample(bank, 2 * n)
        reason, pairs, _ = trial.confirm(drawn[:n], drawn[n:])
        kept += reason.startswith("kept")
        used += pairs
    return rate(kept, tests) | {"pairs": used / tests, "seeds": len(bank)}


def centred_nulls(trial: Trial, rows: Rows, each: int, rng: random.Random) -> dict[str, Any]:
    """Every edit with its mean gain taken off; bytes as the baseline's, so that only the score is judged."""
    kept = tests = used = 0
    worst = ("", 0.0)
    for c in edits(rows, trial.policy.max_pairs):
        both = paired(rows, c.name)
        mean, mine = fmean(gains(both)), 0
        for _ in range(each):
            drawn = rng.sample(both, trial.policy.max_pairs)
            candidate = [{**a, "val_bpb": b["val_bpb"] + mean, "artifact_sha256": "x"} for a, b in drawn]
            reason, pairs, _ = trial.confirm([a for a, _ in drawn], candidate)
            mine += reason.startswith("kept")
            used += pairs
        kept, tests = kept + mine, tests + each
        worst = max(worst, (c.name, mine / each), key=lambda w: w[1])
    return rate(kept, tests) | {"pairs": used / max(1, tests), "edits": len(edits(rows, trial.policy.max_pairs)),
                                "worst": worst[0], "worst_rate": worst[1]}


def rate(hits: int, n: int) -> dict[str, Any]:
    """A share with its 95% interval, as if the ``n`` tests were independent (they share seeds: see the README)."""
    low, high = proportion(hits, n, 0.95)
    return {"tests": n, "kept": hits, "rate": hits / max(1, n), "low": low, "high": high}


def planted(trial: Trial, rows: Rows, each: int, rng: random.Random) -> list[dict[str, Any]]:
    """Every gain and harm: P(keep), pairs used, claimed against true (fresh seeds), and breadth's share."""
    out = []
    n = trial.policy.max_pairs
    for c in edits(rows, n + TRUTH):
        both, short = paired(rows, c.name), paired(rows, c.name, f"breadth-{get_track('pocket').breadth_steps}")
        kept = used = promoted = 0
        claimed, truth = [], []
        for _ in range(each):
            drawn = rng.sample(both, n + TRUTH)
            mine, fresh = drawn[:n], drawn[n:]
            reason, pairs, claim = trial.confirm([a for a, _ in mine], [b for _, b in mine])
            used += pairs
            if len(short) >= trial.policy.breadth_pairs:
                some = rng.sample(short, trial.policy.breadth_pairs)
                promoted += trial.passes_breadth([a for a, _ in some], [b for _, b in some])
            if reason.startswith("kept"):
                kept += 1
                claimed.append(claim)
                truth.append(fmean(gains(fresh)))
        g = gains(both)
        out.append({
            "config": c.name, "planted": c.kind, "n": len(g), "true_gain": fmean(g), "se": stdev(g) / math.sqrt(len(g)),
            "sigma_d": stdev(g), "p_keep": kept / each, "pairs": used / each,
            "breadth_passes": promoted / each if short else None,
            "claimed": fmean(claimed) if claimed else None, "true_when_kept": fmean(truth) if truth else None})
    return out


def panel(trial: Trial, rows: Rows, rng: random.Random) -> list[dict[str, Any]]:
    """For each breadth length: tau against confirm, the veto's false and true kills, and the early stop's."""
    out = []
    for steps in BREADTH:
        names = [c.name for c in configs() if c.name not in (BASE, NULL) and len(paired(rows, c.name)) >= 6
                 and len(paired(rows, c.name, f"breadth-{steps}")) >= 4]
        if len(names) < 12:
            continue
        short = [fmean(gains(paired(rows, n, f"breadth-{steps}"))) for n in names]
        true = [fmean(gains(paired(rows, n))) for n in names]
        tau = kendall(short, true)
        kills: dict[bool, list[float]] = {True: [], False: []}
        for name, gain in zip(names, true, strict=True):
            both = paired(rows, name, f"breadth-{steps}")
            draws = [rng.sample(both, trial.policy.breadth_pairs) for _ in range(60)]
            vetoed = fmean(not trial.passes_breadth([a for a, _ in d], [b for _, b in d]) for d in draws)
            if abs(gain) > trial.policy.materiality_bpb:
                kills[gain > 0].append(vetoed)
        out.append({
            "steps": steps, "configs": len(names), "tau": tau.value, "tau_low": tau.low, "tau_high": tau.high,
            "false_kill": fmean(kills[True]), "true_kill": fmean(kills[False]), "better": len(kills[True]),
            "worse": len(kills[False]), "seconds": fmean(r["seconds"] for n in names
                                                         for r in rows[n, f"breadth-{steps}"].values()),
            "early": early_rates(rows, names, dict(zip(names, true, strict=True)), steps),
            "points": [[n, s, t] for n, s, t in zip(names, short, true, strict=True)]})
    return out


def early_rates(rows: Rows, names: Sequence[str], true: dict[str, float], steps: int) -> list[dict[str, Any]]:
    """Dev-loss differences at the checkpoints of a breadth run: what each limit (nats) would stop."""
    out = []
    stage = f"breadth-{steps}"
    first = paired(rows, names[0], stage)
    for i in range(len(first[0][0]["dev"])):
        over = {n: [b["dev"][i][1] - a["dev"][i][1] for a, b in paired(rows, n, stage)] for n in names}
        for limit in (0.02, 0.05, 0.1, 0.2):
            stopped = {good: [any(d > limit for d in over[n][:2]) for n in names if (true[n] > 0) == good]
                       for good in (True, False)}
            out.append({"step": first[0][0]["dev"][i][0], "limit": limit,
                        "false_stop": fmean(stopped[True]) if stopped[True] else None,
                        "true_stop": fmean(stopped[False]) if stopped[False] else None})
    return out


def slope(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    mx, my = fmean(xs), fmean(ys)
    sxx = sum((x - mx) ** 2 for x in xs)
    b = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sxx
    rest = sum((y - my - b * (x - mx)) ** 2 for x, y in zip(xs, ys, strict=True))
    return b, math.sqrt(rest / max(1, len(xs) - 2) / sxx)


def prices(rows: Rows) -> dict[str, Any]:
    """bpb per 1% of steps (within +-10%), bpb per MB of artifact (width), bytes per payload byte by length."""
    plan = {c.name: c for c in configs()}
    steps = [(100.0 * (plan[n].steps / get_track("pocket").confirm_steps - 1.0), g)
             for n in plan if n.startswith("steps") for g in gains(paired(rows, n))]
    width = [((b["artifact_bytes"] - a["artifact_bytes"]) / 1e6, a["val_bpb"] - b["val_bpb"])
             for n in plan if n.startswith("dim") for a, b in paired(rows, n)]
    growth = {}
    for n in (n for n in plan if n.startswith("length")):
        mine = rows.get((n, "confirm"), {}).values()
        if mine:
            growth[plan[n].steps] = fmean(r["artifact_bytes"] / r["payload_bytes"] for r in mine)
    base = rows[BASE, "confirm"].values()
    growth[get_track("pocket").confirm_steps] = fmean(r["artifact_bytes"] / r["payload_bytes"] for r in base)
    time_, mb = slope(*zip(*steps, strict=True)), slope(*zip(*width, strict=True))
    return {"price_time": time_[0], "price_time_se": time_[1], "price_mb": mb[0], "price_mb_se": mb[1],
            "artifact_per_payload": dict(sorted(growth.items()))}


def measure(rows: Rows, policy: Policy, tests: int, seed: int) -> dict[str, Any]:
    """Every figure. ``tests``: seed nulls; a tenth of it per edit elsewhere."""
    rng, cap = random.Random(seed), get_track("pocket").cap_bytes
    noise = measured_noise(policy, rows)
    trial, fresh = Trial(policy, noise, cap), Trial(policy, shipped(policy), cap)
    each = max(20, tests // 10)
    return {
        "policy_hash": policy.hash, "looks": list(policy.looks), "alpha": policy.alpha,
        "rows": sum(map(len, rows.values())),
        "hours": sum(r["seconds"] for stage in rows.values() for r in stage.values()) / 3600.0,
        "sigma_d_pool": noise.sigma_d, "sigma_d_shipped": shipped(policy).sigma_d, "noise": noise_table(rows),
        "seed_nulls": seed_nulls(trial, rows, tests, rng), "seed_nulls_unpooled": seed_nulls(fresh, rows, tests, rng),
        "centred_nulls": centred_nulls(trial, rows, each, rng),
        "centred_nulls_unpooled": centred_nulls(fresh, rows, each, rng),
        "planted": planted(trial, rows, each, rng), "panel": panel(trial, rows, rng), "prices": prices(rows),
    }


def show(m: dict[str, Any]) -> str:
    """Tables for people."""
    lines = [f"{m['rows']} real runs ({m['hours']:.1f} worker-hours); looks {m['looks']}, alpha {m['alpha']}; "
             f"sigma_d of the pool {m['sigma_d_pool']:.4f}, shipped {m['sigma_d_shipped']:.4f}", "",
             "null tests (kept, 95% interval):"]
    for key, what in (("seed_nulls", "baseline, other seeds"), ("centred_nulls", "edits, mean taken off")):
        for suffix, pool_ in (("", "measured pool"), ("_unpooled", "shipped scale")):
            n = m[key + suffix]
            worst = f"; worst edit {n['worst']} {n['worst_rate']:.1%}" if n.get("worst") else ""
            lines.append(f"  {what:<24} {pool_:<14} {n['kept']:5d} of {n['tests']} = {n['rate']:.2%} "
                         f"[{n['low']:.2%}, {n['high']:.2%}], {n['pairs']:.1f} pairs{worst}")
    lines += ["", "planted:              true gain (se)        sigma_d   P(keep)  pairs  breadth passes  claimed   "
                  "then true"]
    for p in sorted(m["planted"], key=lambda p: -p["true_gain"]):
        breadth = "     -" if p["breadth_passes"] is None else f"{p['breadth_passes']:6.0%}"
        claim = "" if p["claimed"] is None else f"{p['claimed']:+.4f}   {p['true_when_kept']:+.4f}"
        lines.append(f"  {p['config']:<18} {p['true_gain']:+.5f} ({p['se']:.5f})  {p['sigma_d']:.5f}   "
                     f"{p['p_keep']:6.1%}  {p['pairs']:4.1f}   {breadth:>12}     {claim}")
    lines += ["", "panel (breadth against confirm):"]
    for p in m["panel"]:
        lines.append(f"  {p['steps']} steps, {p['configs']} configurations: tau {p['tau']:.2f} [{p['tau_low']:.2f}, "
                     f"{p['tau_high']:.2f}], veto kills {p['false_kill']:.1%} of {p['better']} better, "
                     f"{p['true_kill']:.1%} of {p['worse']} worse, {p['seconds']:.1f} s a run")
        lines += [f"    stop at step {e['step']} above +{e['limit']:g} nats: {e['false_stop']:.0%} of the better, "
                  f"{e['true_stop']:.0%} of the worse" for e in p["early"]]
    x = m["prices"]
    growth = ", ".join(f"{n}: {r:.3f}" for n, r in x["artifact_per_payload"].items())
    lines += ["", f"prices: {x['price_time']:.5f} +- {x['price_time_se']:.5f} bpb per 1% of steps; "
                  f"{x['price_mb']:.3f} +- {x['price_mb_se']:.3f} bpb per MB",
              f"artifact per payload byte, by steps: {growth}"]
    return "\n".join(lines)


def plots(m: dict[str, Any], folder: Path) -> None:
    """P(keep) against the true gain, and breadth against confirm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(7.5, 4.5))
    for p in m["planted"]:
        axis.errorbar(1e3 * p["true_gain"], p["p_keep"], xerr=2e3 * p["se"], fmt="o", ms=5,
                      color="tab:green" if p["true_gain"] > 0 else "tab:red")
    axis.axvline(0.0, color="grey", lw=0.8)
    axis.axvspan(0.0, 1e3 * load_policy("pocket").materiality_bpb, color="grey", alpha=0.15, lw=0)
    axis.set(xlabel="true gain, thousandths of bpb (bars: 2 standard errors; grey: below materiality)",
             ylabel="P(keep), confirm reached", ylim=(-0.03, 1.03),
             title="The gate on planted edits, pocket, real runs")
    figure.tight_layout()
    figure.savefig(folder / "gate_real_planted.png", dpi=130)
    if m["panel"]:
        figure, axes = plt.subplots(1, len(m["panel"]), figsize=(5.2 * len(m["panel"]), 4.6), squeeze=False)
        for axis, p in zip(axes[0], m["panel"], strict=True):
            axis.scatter([1e3 * t for _, _, t in p["points"]], [1e3 * s for _, s, _ in p["points"]], s=18)
            axis.axhline(0, color="grey", lw=0.8)
            axis.axvline(0, color="grey", lw=0.8)
            axis.set(xlabel="confirm gain, thousandths of bpb", ylabel="breadth gain (dev slice)",
                     title=f"{p['steps']} steps: tau {p['tau']:.2f} [{p['tau_low']:.2f}, {p['tau_high']:.2f}]")
        figure.tight_layout()
        figure.savefig(folder / "gate_real_panel.png", dpi=130)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks/results/gate_runs.jsonl")
    parser.add_argument("--tests", type=int, default=1000, help="seed nulls; a tenth of it for each edit elsewhere")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", type=Path, help="another gate.toml")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write two PNGs there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args(argv)
    rows = load(args.runs)
    if len(rows.get((BASE, "confirm"), {})) < 16:
        print(f"{args.runs}: fewer than 16 baseline runs; make them with `python -m benchmarks.gate_runs`",
              file=sys.stderr)
        return 2
    m = measure(rows, load_policy("pocket", args.policy), args.tests, args.seed)
    print(show(m))
    if args.json:
        args.json.write_text(json.dumps(m, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plots(m, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
