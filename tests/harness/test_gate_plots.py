"""The pictures show the figures they are given, with every axis named; the curves obey their laws."""

from __future__ import annotations

import dataclasses
import io
import itertools
from typing import Any

import numpy as np
import pytest

from harness.gate.design import TARGETS, Basis, basis
from harness.gate.plots import SIZES, Curves, curves, nights_picture, rates_picture
from harness.gate.rivals import Figure, Nights, figures, gate_nights, rival_nights, rules
from harness.gate.simulate import Costs, Mix, false_share, propose, rates, reach
from tests.harness.gate_figures import POLICY

SIGMA = POLICY.prior.sigma_d
HONEST = dataclasses.replace(POLICY, honest_pairs=2, honest_extend=2)


@pytest.fixture(scope="module")
def found() -> tuple[Basis, Curves]:
    b = basis(POLICY)
    return b, curves(b, trials=4000, points=11)


@pytest.fixture(scope="module")
def night() -> tuple[list[Nights], dict[str, dict[str, Figure]], Costs]:
    costs = Costs(budget=60.0)
    proposals = propose(HONEST, Mix(name=""), costs, nights=60)
    played = [rival_nights(HONEST, proposals, costs, r) for r in rules(2.0 * SIGMA)]
    played.append(gate_nights(HONEST, proposals, costs))
    return played, {n.rule: figures(n, SIGMA, costs) for n in played}, costs


def png(picture: Any) -> bytes:
    out = io.BytesIO()
    picture.savefig(out, format="png")
    return out.getvalue()


def drawn(line: Any) -> list[float]:
    """The heights of a line."""
    return [float(v) for v in line.get_ydata()]


def test_curves_are_the_rates(found: tuple[Basis, Curves]) -> None:
    _, c = found
    assert c.gains[0] == 0.0 and c.gains[-1] == pytest.approx(5 * SIGMA)
    assert c.gains[4] == pytest.approx(2 * SIGMA)
    assert c.spread[4] == rates(POLICY, c.gains[4], trials=4000).p_keep
    assert c.typical[4] == rates(POLICY, c.gains[4], trials=4000, sigma=SIGMA).p_keep
    assert c.through[4] == c.spread[4] * reach(POLICY, c.gains[4], trials=4000)
    assert all(t <= s for t, s in zip(c.through, c.spread, strict=True))
    assert np.all(np.diff(c.typical) > -0.01) and c.typical[-1] > 0.99


def test_false_keeps_fall_with_the_prior_and_with_the_size_of_gains(found: tuple[Basis, Curves]) -> None:
    _, c = found
    assert list(c.false) == [f"{s:g}" for s in SIZES]
    for shares in c.false.values():
        assert all(a >= b for a, b in itertools.pairwise(shares)) and 0 <= shares[-1] <= 1
    rows = list(c.false.values())
    assert all(small >= big for small, big in zip(rows[0], rows[-1], strict=True))
    # Bayes: with twice the odds of a true gain, half the odds of a false keep
    one, at = rows[1], {round(p, 6): i for i, p in enumerate(c.priors)}
    i, j = 0, len(at) - 1
    odds = (one[i] / (1 - one[i])) / (one[j] / (1 - one[j]))
    want = ((1 - c.priors[i]) / c.priors[i]) / ((1 - c.priors[j]) / c.priors[j])
    assert odds == pytest.approx(want) and false_share(0.0, 1.0, 0.1) == 0.0


def test_the_rates_picture_shows_them(found: tuple[Basis, Curves]) -> None:
    b, c = found
    picture = rates_picture(b, c)
    left, middle, right = picture.axes[:3]
    assert [drawn(line) for line in left.lines[:3]] == [c.typical, c.spread, c.through]
    assert [drawn(line) for line in middle.lines[:2]] == [c.runs_typical, c.runs]
    assert [drawn(line) for line in right.lines[:3]] == list(c.false.values())
    assert TARGETS.power in [drawn(line)[0] for line in left.lines]
    for ax in (left, middle, right):
        assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title()
    assert "bpb" in left.get_xlabel() and "sigma" in left.get_xlabel()
    text = picture.get_suptitle()
    assert POLICY.track in text and "looks 2, 3, 4" in text and "shipped" in text
    (top,) = left.child_axes
    assert list(top.get_xticks()) == list(range(6))
    assert png(picture).startswith(b"\x89PNG")


def test_the_second_axis_counts_in_sigmas(found: tuple[Basis, Curves]) -> None:
    picture = rates_picture(*found)
    left = picture.axes[0]
    png(picture)
    (top,) = left.child_axes
    assert list(top.get_xlim()) == pytest.approx([x / SIGMA for x in left.get_xlim()])


def test_the_nights_picture_shows_every_rule(
    night: tuple[list[Nights], dict[str, dict[str, Figure]], Costs],
) -> None:
    played, shown, costs = night
    picture = nights_picture("a night", played, shown, SIGMA, costs)
    left, middle, right = picture.axes
    assert [t.get_text() for t in middle.get_yticklabels()] == list(shown)
    widths = [p.get_width() for p in middle.patches]  # type: ignore[attr-defined]
    assert widths == [f["false_share"].value for f in shown.values()]
    claims = [p.get_width() for p in right.patches]  # type: ignore[attr-defined]
    assert claims[-1] == shown["gate"]["overclaim_honest"].value
    assert claims[:-1] == [f["overclaim"].value for name, f in shown.items() if name != "gate"]
    gate = np.cumsum(played[-1].progress[:, 0]) / SIGMA
    assert any(np.allclose(line.get_ydata(), gate) for line in left.lines)
    assert left.get_xlim()[1] == pytest.approx(costs.hours(costs.budget))
    assert picture.get_suptitle() == "a night" and len(png(picture)) > 10_000
