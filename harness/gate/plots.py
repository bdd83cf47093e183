"""Pictures of the gate's error rates and of simulated nights. Functions return a matplotlib Figure; nothing is saved.

matplotlib is imported inside the functions, without pyplot: no window system and no global state is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.gate.design import TARGETS, Basis
from harness.gate.noise import form
from harness.gate.rivals import STEPS, Figure, Nights
from harness.gate.simulate import TRUE_SHARE, Costs, false_share, rates, reach, typical_sigma

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

BLUE, ORANGE, GREEN, GREY, RED = "#2b6cb0", "#dd6b20", "#2f855a", "#718096", "#c53030"
FAINT = {"color": GREY, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 0}
SIZES = (1.5, 2.0, 3.0)  # gains, in sigmas, of the false-keep panel


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What the rates picture shows; gains in bpb."""

    gains: list[float]
    typical: list[float]  # P(keep | confirm reached), edits of typical noise
    spread: list[float]  # over the track's spread of noise
    through: list[float]  # the same, breadth included
    runs: list[float]  # mean candidate confirm runs, over the spread
    runs_typical: list[float]
    priors: list[float]  # share of proposals that are true gains
    false: dict[str, list[float]]  # gain in sigmas -> false keeps as a share of keeps, at each prior


def curves(basis: Basis, *, trials: int = 20_000, seed: int = 0, points: int = 41) -> Curves:
    """Rates over a range of true gains (from none to 5 sigma) and of priors (1% to 50%)."""
    policy, sigma = basis.policy, typical_sigma(basis.policy)
    one = sigma if form(policy, basis.noise) == "paired" else None
    gains = [float(g) for g in np.linspace(0.0, 5.0 * sigma, points)]
    spread = [rates(policy, g, trials=trials, seed=seed, noise=basis.noise) for g in gains]
    typical = [rates(policy, g, trials=trials, seed=seed, noise=basis.noise, sigma=one) for g in gains]
    reached = [reach(policy, g, trials=trials, seed=seed, noise=basis.noise) for g in gains]
    null = rates(policy, 0.0, trials=10 * trials, seed=seed + 1, noise=basis.noise).p_keep
    priors = [float(p) for p in np.geomspace(0.01, 0.5, points)]
    false = {}
    for size in SIZES:
        power = rates(policy, size * sigma, trials=trials, seed=seed + 2, noise=basis.noise).p_keep
        through = reach(policy, size * sigma, trials=trials, seed=seed, noise=basis.noise) * power
        false[f"{size:g}"] = [false_share(reached[0] * null, through, p) for p in priors]
    return Curves(
        gains=gains, typical=[r.p_keep for r in typical], spread=[r.p_keep for r in spread],
        through=[r.p_keep * p for r, p in zip(spread, reached, strict=True)], runs=[r.runs for r in spread],
        runs_typical=[r.runs for r in typical], priors=priors, false=false)


def rates_picture(basis: Basis, c: Curves) -> Picture:
    """Power and cost against the true gain, and false keeps against the prior. 1500 x 480 pixels at 100 dpi."""
    picture, (left, middle, right) = _sheet(3)
    policy, sigma = basis.policy, typical_sigma(basis.policy)
    left.plot(c.gains, c.typical, color=BLUE, linewidth=2.2, label="edits of typical noise")
    left.plot(c.gains, c.spread, color=ORANGE, linewidth=2.2, label="all edits (the track's spread of noise)")
    left.plot(c.gains, c.through, color=ORANGE, linewidth=1.6, linestyle=":", label="all edits, breadth included")
    left.axhline(TARGETS.power, **FAINT)
    left.axvline(2.0 * sigma, **FAINT)
    left.set(ylim=(-0.02, 1.02), ylabel="P(keep)", title="Power")
    _percent(left.yaxis)
    left.legend(loc="lower right", frameon=False, fontsize=8.5)
    middle.plot(c.gains, c.runs_typical, color=BLUE, linewidth=2.2)
    middle.plot(c.gains, c.runs, color=ORANGE, linewidth=2.2)
    middle.axhline(TARGETS.runs, **FAINT)
    middle.axvline(2.0 * sigma, **FAINT)
    middle.set(ylim=(0, max(policy.max_pairs, TARGETS.runs) * 1.08), ylabel="candidate confirm runs, mean",
               title="Cost")
    for ax in (left, middle):
        ax.set(xlim=(0.0, c.gains[-1]), xlabel="true gain, bpb (top: in typical sigmas)")
        top = ax.secondary_xaxis("top", functions=(lambda g: g / sigma, lambda s: s * sigma))
        top.set_xticks(range(6))
        ax.locator_params(axis="x", nbins=7)
        top.tick_params(labelsize=8, colors=GREY)
    for (size, shares), color in zip(c.false.items(), (GREY, ORANGE, GREEN), strict=True):
        right.plot(c.priors, shares, color=color, linewidth=2.2, label=f"true gains of {size} sigma")
    _false_axes(right)
    right.legend(loc="upper right", frameon=False, fontsize=8.5)
    picture.suptitle(f"{policy.track}: looks {', '.join(map(str, policy.looks))}, alpha {policy.alpha:g} "
                     f"({policy.spending}); {'shipped' if basis.source == 'shipped' else 'the ledger’s own'} noise, "
                     f"typical sigma {sigma:.4f} bpb. Dashed: targets", fontsize=10.5, x=0.01, ha="left")
    return picture


def _false_axes(ax: Axes) -> None:
    """Priors on a logarithmic scale, shares in per cent."""
    ax.set_xscale("log")
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    ax.set_xticks(ticks, [f"{t:.0%}" for t in ticks])
    ax.minorticks_off()
    ax.axhline(TARGETS.false_share, **FAINT)
    ax.axvline(TRUE_SHARE, **FAINT)
    ax.set(xlim=(0.01, 0.5), ylim=(0.0, 0.5), xlabel="share of proposals that are true gains",
           ylabel="share of keeps without a gain")
    ax.set_title("False keeps", pad=23)  # as high as those above a second axis
    _percent(ax.yaxis)


def nights_picture(
    title: str, nights: Sequence[Nights], shown: Mapping[str, Mapping[str, Figure]], sigma: float, costs: Costs,
) -> Picture:
    """Progress through a night, false keeps, and what is claimed beyond the truth. ``shown``: rule -> its figures."""
    picture, (left, middle, right) = _sheet(3, left_margin=True)
    hours = costs.hours(costs.budget) * (np.arange(STEPS) + 1.0) / STEPS
    fresh = [n for n in nights if n.rule in ("gate", *(r for r in shown if r.startswith("keep if lower")))]
    colors = dict(zip((n.rule for n in fresh), (GREY, RED, BLUE), strict=False)) | {"gate": BLUE}
    for n in fresh:
        true, claimed = np.cumsum(n.progress, axis=0).T / sigma
        left.plot(hours, true, color=colors[n.rule], linewidth=2.2, label=f"{n.rule}: true")
        left.plot(hours, claimed, color=colors[n.rule], linewidth=1.3, linestyle=":", label="  as its own scores claim")
    left.set(xlim=(0.0, hours[-1]), ylim=(0.0, None), xlabel="trainer-hours", ylabel="cumulative gain, typical sigmas",
             title="Progress")
    left.legend(loc="upper left", frameon=False, fontsize=8.5)
    names = list(shown)
    at = np.arange(len(names))[::-1]
    bar = [BLUE if name == "gate" else "#a0aec0" for name in names]
    _bars(middle, at, [shown[n]["false_share"] for n in names], bar, "{:.0%}")
    middle.axvline(TARGETS.false_share, **FAINT)
    middle.set_yticks(at, names, fontsize=9)
    middle.set(xlim=(0.0, 1.0), xlabel="share of keeps without a gain", title="False keeps")
    _percent(middle.xaxis)
    claims = [shown[n].get("overclaim_honest", shown[n]["overclaim"]) for n in names]
    _bars(right, at, claims, bar, "{:+.2f}")
    right.set_yticks(at, [])
    right.set(xlim=(min(0.0, *(c.value * 1.2 for c in claims)), max(c.value for c in claims) * 1.2),
              xlabel="claimed - true gain of a night, typical sigmas", title="Claims (the gate's: on fresh runs)")
    picture.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    return picture


def _bars(ax: Axes, at: Any, figures: Sequence[Figure], colors: Sequence[str], text: str) -> None:
    """Horizontal bars with their values and two standard errors."""
    values = [f.value for f in figures]
    ax.barh(at, values, color=colors, height=0.62, xerr=[2.0 * f.error for f in figures],
            error_kw={"ecolor": "#4a5568", "elinewidth": 1.0})
    for y, f in zip(at, figures, strict=True):
        ax.annotate(text.format(f.value), (max(f.value, 0.0) + 2.0 * f.error, y), xytext=(4, 0),
                    textcoords="offset points", va="center", fontsize=8.5)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _sheet(panels: int, *, left_margin: bool = False) -> tuple[Picture, Any]:
    """An empty figure with ``panels`` axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

    picture = Sheet(figsize=(15.0, 4.8), dpi=100, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(1, panels, width_ratios=(1.15, 1.0, 1.0) if left_margin else None)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.title.set_fontsize(11)
    return picture, axes
