"""Error rates of the gate's policies, by simulation: ``python -m benchmarks.gate_rates [--json]``.

Per track of ``harness/gate.toml``: P(keep) with no gain, at the target gain and at 1, 2, 3 sigma, false keeps
as a share of keeps when one proposal in ten is a true gain, candidate runs, the luck of single control banks.
The other side: a greedy loop that keeps whatever scores better than its best score so far. Seeded: the
same numbers every time. ``--design TRACK`` lists alternatives to that track's policy, the cheapest that
meets the targets first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from typing import Any

from harness.gate.design import design
from harness.gate.greedy import greedy
from harness.gate.noise import form, shipped
from harness.gate.policy import load_policy, tracks
from harness.gate.simulate import bank_spread, pooled_noise, summary, typical_sigma

TARGETS = {"pocket": 0.02}
"""Gain (bpb) that a track must not miss; elsewhere 2 sigma."""


def measure(track: str, trials: int, seed: int) -> dict[str, Any]:
    """Every figure of one track. ``trials`` per rate; the Monte Carlo error of a rate p is sqrt(p(1-p)/trials)."""
    policy = load_policy(track)
    sigma = typical_sigma(policy)
    gain = TARGETS.get(track, 2.0 * sigma)
    out: dict[str, Any] = {
        "track": track, "policy_hash": policy.hash, "form": form(policy, shipped(policy)), "sigma": sigma,
        "alpha": policy.alpha, "looks": list(policy.looks), "spending": policy.spending,
        "materiality": policy.materiality_bpb, "target_gain": gain,
        "spread": dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed)),
        "typical": dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed + 100, sigma=sigma)),
        "noisy": dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed + 200, sigma=3.0 * sigma)),
        "greedy": dataclasses.asdict(greedy(policy, gain, seed=seed)),
        "greedy_one_seed": dataclasses.asdict(greedy(policy, gain, paired=True, seed=seed)),
    }
    if out["form"] == "paired":
        noise = pooled_noise(policy, seed=seed)
        out["pooled_sigma_d"] = noise.sigma_d
        out["pooled"] = dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed + 300, noise=noise))
        out["banks"] = bank_spread(policy, seed=seed)
    return out


def _line(label: str, s: dict[str, Any]) -> str:
    powers = "  ".join(f"{p['p_keep']:6.1%} ({p['runs']:.1f})" for p in s["powers"])
    return (f"  {label:<28} {s['null']['p_keep']:8.3%} {s['at_materiality']['p_keep']:8.3%} "
            f"{s['target']['p_keep']:7.1%} ({s['target']['runs']:.1f})  {s['false_share']:7.2%}  {s['runs']:5.2f}   "
            f"{powers}")


def show(m: dict[str, Any]) -> str:
    """The table of one track."""
    lines = [
        f"{m['track']}: {m['form']}, looks {m['looks']}, alpha {m['alpha']}, {m['spending']}, materiality "
        f"{m['materiality']}, sigma {m['sigma']}, target gain {m['target_gain']}",
        f"  {'edits of':<28} {'no gain':>8} {'at mat.':>8} {'at target (runs)':>14} {'false/keeps':>11} "
        f"{'runs':>5}   at 1, 2, 3 sigma (runs)",
        _line("the track's spread of noise", m["spread"]), _line("typical noise", m["typical"]),
        _line("3 x typical noise", m["noisy"]),
    ]
    if "pooled" in m:
        lines.append(_line(f"spread, pool of 40 ({m['pooled_sigma_d']:.4f})", m["pooled"]))
        b = m["banks"]
        lines.append(f"  false keeps of 40 pure-noise trials on one control bank: mean {b['mean']:.2%}, 95% of banks "
                     f"under {b['p95']:.1%}, 99% under {b['p99']:.1%}, worst of 2000 {b['max']:.1%}")
    for key, name in (("greedy", "fresh seeds"), ("greedy_one_seed", "one seed")):
        g = m[key]
        lines.append(f"  greedy, {name}, 40 proposals: {g['keeps']:.1f} keeps, {g['false_share']:.0%} of them no gain, "
                     f"claimed {g['claimed']:+.4f}, true {g['true']:+.4f}")
    return "\n".join(lines)


def alternatives(track: str, gain: float | None, seed: int, *, as_json: bool) -> str:
    """Other choices of alpha, spending and shrinkage for ``track``, against the targets of ``design``."""
    policy = load_policy(track)
    gain = gain or TARGETS.get(track, 2.0 * typical_sigma(policy))
    choices = design(policy, gain, shrink_dfs=(2.0, 3.0), seed=seed)
    if as_json:
        return json.dumps([dataclasses.asdict(c) for c in choices], indent=1)
    return "\n".join(
        f"{'meets' if c.meets else '     '} alpha {c.alpha:<7g} {c.spending:<15} shrink_df {c.shrink_df:g}  "
        f"no gain {c.null_keep:.3%}  edge {c.edge_keep:.3%}  power {c.power:.1%}  "
        f"false/keeps {c.false_share:.2%}  runs {c.runs:.2f}" for c in choices)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--track", action="append", help="only this track (may be repeated)")
    parser.add_argument("--trials", type=int, default=100_000, help="simulated trials per rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--design", metavar="TRACK", help="list alternatives to this track's policy")
    parser.add_argument("--gain", type=float, help="with --design: the true gain that must be kept, bpb")
    args = parser.parse_args(argv)
    if args.design:
        print(alternatives(args.design, args.gain, args.seed, as_json=args.json))
        return 0
    measured = [measure(t, args.trials, args.seed) for t in args.track or [t for t in tracks() if t != "nano"]]
    if args.json:
        print(json.dumps({"trials": args.trials, "seed": args.seed, "python": platform.python_version(),
                          "machine": platform.machine(), "tracks": measured}, indent=1))
    else:
        print("\n\n".join(show(m) for m in measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
