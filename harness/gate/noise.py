"""How noisy a difference is: a shipped scale, what earlier trials taught, and this trial's own spread.

Two scales are carried, both in bpb: ``sigma_d``, the standard deviation of a same-seed difference
between two configurations (for the paired form), and ``sigma_run``, that of one configuration over seeds
(for the two-sample form). Each pool starts from the shipped scale, inflated and worth few degrees of
freedom, and takes in the sums of squares of earlier trials of the same fingerprint. The variance of
differences belongs to the edit (0.0008 to 0.012 were seen on one track), so a trial's own variance is
shrunk towards the pool, never replaced by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from harness.gate.policy import Policy
from ledger.records import Decided


class NoiseError(ValueError):
    """Figures from which no noise scale can be computed."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The pooled scale that a verdict starts from. Only floats: it is recorded as ``noise_prior``."""

    sigma_d: float  # bpb, of a same-seed difference
    df: float  # degrees of freedom behind sigma_d
    sigma_run: float  # bpb, of one configuration over seeds
    run_df: float
    trials: float = 0.0  # earlier trials in the pool (0: the shipped scale alone)
    clipped: float = 0.0  # of these, how many entered with a deviation cut down to the clip

    @property
    def correlation(self) -> float:
        """Same-seed correlation that the two scales imply: var(a - b) = 2 s^2 (1 - rho)."""
        return 1.0 - self.sigma_d**2 / (2.0 * self.sigma_run**2)

    def to_dict(self) -> dict[str, float]:
        """For ``Decided.noise_prior``."""
        return asdict(self)


def noise_from_dict(data: Mapping[str, float]) -> Noise:
    """Inverse of :meth:`Noise.to_dict`. Raises NoiseError on missing, unknown or impossible values."""
    try:
        noise = Noise(**data)
    except TypeError as e:
        raise NoiseError(f"noise prior {dict(data)!r}: {e}") from None
    for name, value in asdict(noise).items():
        positive = name in ("sigma_d", "df", "sigma_run", "run_df")
        known = isinstance(value, int | float) and math.isfinite(value)
        if not known or value < 0 or (positive and value == 0):
            raise NoiseError(f"noise prior: {name} = {value!r}; valid: a finite number "
                             f"{'above' if positive else 'from'} 0")
    return noise


def shipped(policy: Policy) -> Noise:
    """The scale before anything was measured: the policy's prior, inflated."""
    return pool(policy, ())


def _squares(values: Sequence[float]) -> float:
    """Sum of squared deviations from the mean."""
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values)


def pool(
    policy: Policy,
    pairs: Iterable[tuple[Sequence[float], Sequence[float]]],
    runs: Iterable[Sequence[float]] = (),
) -> Noise:
    """The shipped scale joined with earlier measurements of the *same* fingerprint.

    ``pairs``: per earlier trial, val_bpb of control and candidate over the same seeds, in the same order
    (at least 2, else the trial is passed over). ``runs``: val_bpb of one configuration over seeds, e.g.
    the values of ``noise.measured``. A trial's deviation counts for at most ``pool_clip`` inflated
    shipped sigmas. Raises NoiseError on unequal lengths or non-finite values.
    """
    prior = policy.prior
    base_d, base_run = prior.sigma_d * prior.inflation, prior.sigma_run * prior.inflation
    sum_d, df_d = prior.df * base_d**2, prior.df
    sum_run, df_run = prior.df * base_run**2, prior.df
    trials = clipped = 0
    for control, candidate in pairs:
        if len(control) != len(candidate):
            raise NoiseError(f"a trial of {len(control)} control and {len(candidate)} candidate runs is not "
                             "paired; pass equally many, seed by seed")
        _finite([*control, *candidate])
        dof = len(control) - 1
        if dof < 1:
            continue
        trials += 1
        squares = _squares([a - b for a, b in zip(control, candidate, strict=True)])
        limit = dof * (policy.pool_clip * base_d) ** 2
        clipped += squares > limit
        sum_d += min(squares, limit)
        df_d += dof
        # both sides share their seeds, so they count once: the mean of the two sums, at dof
        run_limit = dof * (policy.pool_clip * base_run) ** 2
        sum_run += min((_squares(control) + _squares(candidate)) / 2.0, run_limit)
        df_run += dof
    for values in runs:
        _finite(values)
        if len(values) > 1:
            sum_run += min(_squares(values), (len(values) - 1) * (policy.pool_clip * base_run) ** 2)
            df_run += len(values) - 1
    return Noise(
        sigma_d=math.sqrt(sum_d / df_d), df=min(df_d, policy.pool_df_cap),
        sigma_run=math.sqrt(sum_run / df_run), run_df=min(df_run, policy.pool_df_cap),
        trials=float(trials), clipped=float(clipped),
    )


def _finite(values: Sequence[float]) -> None:
    for v in values:
        if not math.isfinite(v):
            raise NoiseError(f"val_bpb = {v!r} in the noise pool; only finite figures are pooled")


def pool_decided(
    policy: Policy, decided: Iterable[Decided], runs: Iterable[Sequence[float]] = (),
    pairs: Iterable[tuple[Sequence[float], Sequence[float]]] = (),
) -> Noise:
    """:func:`pool` over earlier verdicts that reached confirm, and ``pairs`` and ``runs`` as it takes them.

    The caller passes one fingerprint only.
    """
    groups: list[tuple[Sequence[float], Sequence[float]]] = list(pairs)
    for d in decided:
        if d.stage != "confirm":
            continue
        control = {(r.k, r.seed): r.val_bpb for r in d.control}
        both = [(control[r.k, r.seed], r.val_bpb) for r in d.candidate if (r.k, r.seed) in control]
        groups.append(([a for a, _ in both], [b for _, b in both]))
    return pool(policy, groups, runs)


def shrink(sigma0: float, df0: float, squares: float, dof: int) -> tuple[float, float]:
    """(sigma, df): a trial's sum of squares with ``dof`` degrees of freedom, shrunk towards ``sigma0``.

    s^2 = (df0 sigma0^2 + squares) / (df0 + dof): the posterior scale under a scaled inverse chi-square
    prior, so that the mean over its standard error is Student t with df0 + dof degrees of freedom.
    """
    return math.sqrt((df0 * sigma0**2 + squares) / (df0 + dof)), df0 + dof


def form(policy: Policy, noise: Noise) -> str:
    """``paired`` or ``two-sample``: from the pool, before the trial's own figures are seen.

    A trial's own 2 to 8 pairs say next to nothing about a correlation (two pairs: always +1 or -1), and
    a choice made after seeing them could be picked for its result.
    """
    return "paired" if noise.correlation >= policy.min_correlation else "two-sample"
