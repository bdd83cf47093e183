"""The gate beside the field's usual rules, whole nights by simulation, and its error rates per trial.

    python -m benchmarks.gate                            # nights, three mixes of proposals, two tracks
    python -m benchmarks.gate --track pocket --gain 5    # true gains of 5 typical sigmas
    python -m benchmarks.gate --plot gate.png            # and a picture of the first track and mix
    python -m benchmarks.gate --rates                    # per trial: alpha, power, spread of noise, luck of banks

Every rule gets the same proposals and the same trainer time (``harness.gate.rivals`` says what is modelled and what
each rule does). Seeded: the same numbers every time. Every figure carries its Monte Carlo standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

from harness.gate.design import TARGETS, target_gain
from harness.gate.noise import form, shipped
from harness.gate.policy import Policy, load_policy, tracks
from harness.gate.rivals import Figure, Nights, figures, gate_nights, rival_nights, rules
from harness.gate.simulate import (
    Costs,
    Mix,
    World,
    bank_spread,
    breadth_tau,
    pooled_noise,
    propose,
    rates,
    summary,
    typical_sigma,
)
from harness.output import say

PACE = {
    "pocket": Costs(confirm_seconds=23.0, short=0.25, workers=2),  # measured: breadth 16 s, a run of a few steps 6 s
    "gpu-proxy": Costs(breadth=30.0 / 180.0),  # what the track aims at, not measured
}
"""What a track's runs cost where that is known better than by default."""
NIGHTS, TRIALS = 5000, 100_000
TRACKS = ("pocket", "gpu-proxy")

COLUMNS = (  # figure, head, format
    ("keeps", "keeps", "{:.2f}"), ("false_share", "no gain", "{:.1%}"), ("harm_share", "harms", "{:.2%}"),
    ("p_keep", "P(keep|gain)", "{:.1%}"), ("runs_per_trial", "runs/trial", "{:.2f}"),
    ("gain_per_hour", "gain/hour", "{:.3f}"), ("overclaim", "claim - true", "{:+.2f}"),
)
GATE_ONLY = (
    ("p_keep_reached", "P(keep | true gain, confirm reached)", "{:.1%}"),
    ("breadth_losses", "breadth's share of the true gains that were lost", "{:.1%}"),
    ("runs_per_true", "candidate confirm runs per true gain that reached confirm", "{:.2f}"),
    ("reverted", "keeps taken back after fresh pairs", "{:.1%}"),
    ("standing_false_share", "no gain, of the keeps left standing", "{:.1%}"),
    ("overclaim_honest", "honest claim - true, a night (sigmas)", "{:+.3f}"),
    ("overclaim_honest_per_keep", "the same per keep", "{:+.3f}"),
)


LEGEND = """
keeps: a night; no gain, harms: share of keeps whose true gain is <= 0, < 0; P(keep|gain): of the true gains tried,
breadth included; runs: candidate confirm runs; gain/hour: true gain per trainer-hour, sigmas; claim - true: cumulative
gain of a night as the winning scores show it, less the true one, sigmas. Rivals make one run per proposal and inherit
the score that won. keep if lower: karpathy/autoresearch. best/MAD >= 2: pi-autoresearch, its advice taken strictly:
lower than the best kept, and |best kept - first| / median absolute deviation of all results >= 2 (this one counted as
kept; never before the third result). lower by X: X = 2 sigma below the best. gate: harness/gate.toml as it is."""


def mixes(gain: float) -> tuple[Mix, ...]:
    """What is proposed in each table."""
    return (Mix(name="plain", gain=gain), Mix(name="harsh", gain=gain, harm_share=0.5),
            Mix(name="spread", gain=gain, spread=True),
            Mix(name="wear", gain=gain, spread=True, harm_share=1.0, harm=0.25))


def compare(
    policy: Policy, mix: Mix, costs: Costs, world: World, nights: int, seed: int,
) -> tuple[list[Nights], dict[str, dict[str, Figure]], float]:
    """(every rule's nights, rule -> figures, Kendall's tau of breadth) on one set of proposals."""
    sigma = typical_sigma(policy)
    proposals = propose(policy, mix, costs, nights=nights, world=world, seed=seed)
    played = [rival_nights(policy, proposals, costs, r, seed=seed) for r in rules(2.0 * sigma)]
    played.append(gate_nights(policy, proposals, costs, world=world, seed=seed))
    return played, {n.rule: figures(n, sigma, costs) for n in played}, breadth_tau(proposals)


def goals(policy: Policy, shown: dict[str, dict[str, Figure]], mix: Mix, seed: int) -> list[dict[str, Any]]:
    """The targets held against the nights of one mix; ``met`` is by the figure itself, whatever its error."""
    t, gate = TARGETS, shown["gate"]
    sigma = typical_sigma(policy)
    one = sigma if form(policy, shipped(policy)) == "paired" else None
    typical = rates(policy, mix.gain * sigma, seed=seed, sigma=one)

    def goal(words: str, value: float, error: float, met: bool) -> dict[str, Any]:
        return {"goal": words, "value": value, "error": error, "met": bool(met)}

    false, reached, runs = gate["false_share"], gate["p_keep_reached"], gate["runs_per_true"]
    claim, rate = gate["overclaim_honest"], gate["gain_per_hour"]
    out = [goal(f"false keeps at most {t.false_share:.0%} of keeps", false.value, false.error,
                false.value <= t.false_share)]
    if not mix.spread:
        out += [
            goal(f"P(keep) at least {t.power:.0%} at {mix.gain:g} sigma, confirm reached, edits of typical noise",
                 typical.p_keep, typical.mc_error, typical.p_keep >= t.power),
            goal("  the same over the track's spread of noise, in these nights", reached.value, reached.error,
                 reached.value >= t.power),
            goal(f"at most {t.runs:g} candidate confirm runs for it", runs.value, runs.error, runs.value <= t.runs)]
    out.append(goal(f"|honest claim - true| of a night at most {t.overclaim:g} sigma", claim.value, claim.error,
                    abs(claim.value) <= t.overclaim))
    for rule, f in shown.items():
        if rule.startswith("keep if lower"):
            ratio = quotient(rate, f["gain_per_hour"])
            out.append(goal(f"true gain per trainer-second no lower than '{rule}' (ratio)", ratio.value, ratio.error,
                            ratio.value >= 1.0))
    return out


def quotient(a: Figure, b: Figure) -> Figure:
    """a / b, errors taken as independent (they share proposals, so this overstates). 0 when b is not positive."""
    if b.value <= 0.0:
        return Figure(0.0, 0.0)
    return Figure(a.value / b.value, math.hypot(a.error / b.value, a.value * b.error / b.value**2))


def nights(track: str, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """One track: every mix, as JSON-able values; and the picture of the first mix when one is asked for."""
    policy, world = load_policy(track), World(breadth_sigma=args.breadth_sigma, disagreement=args.disagreement)
    pace = PACE.get(track, Costs())
    costs = dataclasses.replace(pace, budget=args.budget, breadth=args.breadth_cost or pace.breadth)
    sigma, tables, picture = typical_sigma(policy), [], None
    for mix in mixes(args.gain):
        played, shown, tau = compare(policy, mix, costs, world, args.trials or NIGHTS, args.seed)
        tables.append({
            "mix": dataclasses.asdict(mix), "words": mix.words, "kendall_tau": tau,
            "rules": {rule: {k: [f.value, f.error] for k, f in fs.items()} for rule, fs in shown.items()},
            "goals": goals(policy, shown, mix, args.seed)})
        if args.plot and picture is None:
            from harness.gate.plots import nights_picture

            night = f"a night of {costs.budget:g} confirm runs ({costs.hours(costs.budget):.1f} trainer-hours)"
            picture = nights_picture(f"{track}: {night}; {mix.words}", played, shown, sigma, costs)
    return {"track": track, "policy_hash": policy.hash, "sigma": sigma, "costs": dataclasses.asdict(costs),
            "world": dataclasses.asdict(world), "nights": args.trials or NIGHTS, "mixes": tables}, picture


def show_nights(m: dict[str, Any]) -> str:
    """The tables of one track."""
    c = m["costs"]
    lines = [f"{m['track']}: {m['nights']} nights of {c['budget']:g} confirm runs = "
             f"{c['budget'] * c['confirm_seconds'] / 3600.0:.1f} trainer-hours ({c['confirm_seconds']:g} s each; a "
             f"breadth run costs {c['breadth']:.2f}, a run of a few steps {c['short']:g}, workers {c['workers']}); "
             f"sigma = {m['sigma']:g} bpb"]
    for table in m["mixes"]:
        lines += ["", f" {table['mix']['name']}: {table['words']}; breadth's tau {table['kendall_tau']:.2f}",
                  f"  {'rule':<28}" + "".join(f"{head:>16}" for _, head, _ in COLUMNS)]
        for rule, f in table["rules"].items():
            cells = (f"{text.format(f[key][0])} ±{text.format(f[key][1]).lstrip('+')}" for key, _, text in COLUMNS)
            lines.append(f"  {rule:<28}" + "".join(f"{cell:>16}" for cell in cells))
        gate = table["rules"]["gate"]
        lines += [f"    gate: {words}: {text.format(gate[key][0])} ±{text.format(gate[key][1]).lstrip('+')}"
                  for key, words, text in GATE_ONLY]
        lines += [f"    {'met    ' if g['met'] else 'NOT MET'} {g['goal']}: {g['value']:.3f} ±{g['error']:.3f}"
                  for g in table["goals"]]
    return "\n".join(lines)


def measure(track: str, trials: int, seed: int) -> dict[str, Any]:
    """Rates per trial of one track. The Monte Carlo error of a rate p is sqrt(p (1 - p) / trials)."""
    policy = load_policy(track)
    sigma, gain = typical_sigma(policy), target_gain(policy)
    out: dict[str, Any] = {
        "track": track, "policy_hash": policy.hash, "form": form(policy, shipped(policy)), "sigma": sigma,
        "alpha": policy.alpha, "looks": list(policy.looks), "spending": policy.spending,
        "materiality": policy.materiality_bpb, "target_gain": gain,
        "spread": dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed)),
        "typical": dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed + 100, sigma=sigma)),
        "noisy": dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed + 200, sigma=3.0 * sigma)),
    }
    if out["form"] == "paired":
        noise = pooled_noise(policy, seed=seed)
        out["pooled_sigma_d"] = noise.sigma_d
        out["pooled"] = dataclasses.asdict(summary(policy, gain, trials=trials, seed=seed + 300, noise=noise))
        out["banks"] = bank_spread(policy, seed=seed)
    return out


def show_rates(m: dict[str, Any]) -> str:
    """The rates of one track."""
    def line(label: str, s: dict[str, Any]) -> str:
        powers = "  ".join(f"{p['p_keep']:6.1%} ({p['runs']:.1f})" for p in s["powers"])
        null, edge, target = s["null"], s["at_materiality"], s["target"]
        return (f"  {label:<28} {null['p_keep']:8.3%} {edge['p_keep']:8.3%} {target['p_keep']:7.1%} "
                f"({target['runs']:.1f})  {s['false_share']:7.2%}  {s['runs']:5.2f}   {powers}")

    lines = [
        f"{m['track']}: {m['form']}, looks {m['looks']}, alpha {m['alpha']}, {m['spending']}, materiality "
        f"{m['materiality']}, sigma {m['sigma']}, target gain {m['target_gain']}",
        f"  {'edits of':<28} {'no gain':>8} {'at mat.':>8} {'at target (runs)':>14} {'false/keeps':>11} "
        f"{'runs':>5}   at 1, 2, 3 sigma of the row's edits (runs)",
        line("the track's spread of noise", m["spread"]), line("typical noise", m["typical"]),
        line("3 x typical noise", m["noisy"]),
    ]
    if "pooled" in m:
        b = m["banks"]
        lines += [line(f"spread, pool of 40 ({m['pooled_sigma_d']:.4f})", m["pooled"]),
                  f"  false keeps of 40 pure-noise trials on one control bank: mean {b['mean']:.2%}, 95% of banks "
                  f"under {b['p95']:.1%}, 99% under {b['p99']:.1%}, worst of 2000 {b['max']:.1%}"]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options. Exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--track", action="append", choices=tracks(), help="may be repeated; default: "
                        + ", ".join(TRACKS) + "; with --rates all but nano")
    parser.add_argument("--rates", action="store_true", help="per-trial rates of the policies instead of nights")
    parser.add_argument("--trials", type=int, help=f"nights (default {NIGHTS}); with --rates simulated trials per rate "
                        f"(default {TRIALS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="picture of the first track's first mix")
    parser.add_argument("--gain", type=float, default=2.0, help="size of a true gain, typical sigmas (default 2)")
    parser.add_argument("--budget", type=float, default=Costs.budget, help="a night, in confirm runs (default 160)")
    parser.add_argument("--breadth-cost", type=float, help="a breadth run, in confirm runs (default: the track's, "
                        f"where known, else {Costs.breadth})")
    parser.add_argument("--breadth-sigma", type=float, default=World.breadth_sigma,
                        help="sigma of a breadth difference over that of a confirm difference")
    parser.add_argument("--disagreement", type=float, default=World.disagreement,
                        help="standard deviation of breadth effect - confirm effect, typical sigmas")
    args = parser.parse_args(argv)
    positive = {"--gain": args.gain, "--breadth-cost": args.breadth_cost, "--breadth-sigma": args.breadth_sigma}
    for name, value in positive.items():
        if value is not None and not 0.0 < value < 1000.0:
            parser.error(f"{name} {value:g}: expected a number above 0")
    if args.trials is not None and args.trials < 2:
        parser.error(f"--trials {args.trials}: expected at least 2")
    if args.budget < 20.0:
        parser.error(f"--budget {args.budget:g}: expected at least 20 confirm runs: a night must hold some trials")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: expected 0 or more")
    if args.plot and not args.plot.absolute().parent.is_dir():
        parser.error(f"--plot {args.plot}: no such folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse(argv)
    measured: list[dict[str, Any]] = []
    if args.rates:
        measured = [measure(t, args.trials or TRIALS, args.seed)
                    for t in args.track or [t for t in tracks() if t != "nano"]]
        text = "\n\n".join(map(show_rates, measured))
    else:
        for track in args.track or TRACKS:
            found, picture = nights(track, args)
            measured.append(found)
            if picture is not None:
                picture.savefig(args.plot)
                args.plot = None
        text = "\n\n".join([*map(show_nights, measured), LEGEND.strip()])
    if args.json:
        say(json.dumps({"seed": args.seed, "python": platform.python_version(), "machine": platform.machine(),
                          "section": "rates" if args.rates else "nights", "tracks": measured}, indent=1), sys.stdout)
    else:
        say(text, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
