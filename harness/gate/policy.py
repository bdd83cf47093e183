"""The gate's policy: every number that a verdict depends on, declared once and read from ``gate.toml``.

A policy travels with each verdict (``Decided.policy``), so that the verdict can be computed again
years later from its own record. Hence two rules for this file: a field never changes its meaning, and
a new field's default must mean what was done before the field existed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLICY_FILE = Path(__file__).resolve().parent.parent / "gate.toml"

SPENDINGS = ("obrien-fleming", "power-3", "power-2", "power-1.5", "power-1", "pocock")  # late to early


class PolicyError(ValueError):
    """A policy that says something impossible. Names the file, field, value, and what is valid."""


def _declare(default: Any, doc: str, valid: str, test: Callable[[Any], bool]) -> Any:
    """A dataclass field that carries its meaning (``doc``) and its range (``valid``, ``test``)."""
    return field(default=default, metadata={"doc": doc, "valid": valid, "test": test})


def _real(default: float, doc: str, lo: float, hi: float, *, open_lo: bool = False) -> Any:
    """A finite float in [lo, hi], or in (lo, hi] with ``open_lo``."""
    def test(v: Any) -> bool:
        return isinstance(v, float) and math.isfinite(v) and (lo < v if open_lo else lo <= v) and v <= hi

    return _declare(default, doc, f"a number {'above' if open_lo else 'from'} {lo:g} to {hi:g}", test)


def _whole(default: int, doc: str, lo: int, hi: int) -> Any:
    """An int in [lo, hi]."""
    return _declare(default, doc, f"a whole number from {lo} to {hi}",
                    lambda v: isinstance(v, int) and not isinstance(v, bool) and lo <= v <= hi)


def _increasing(v: Any) -> bool:
    """Between 1 and 12 pair counts, each at least 2, each above the one before."""
    return (isinstance(v, tuple) and 1 <= len(v) <= 12
            and all(isinstance(n, int) and not isinstance(n, bool) and 2 <= n <= 1000 for n in v)
            and all(a < b for a, b in itertools.pairwise(v)))


def _fractions(v: Any) -> bool:
    """At most 8 increasing floats strictly between 0 and 1."""
    return (isinstance(v, tuple) and len(v) <= 8 and all(isinstance(x, float) and 0.0 < x < 1.0 for x in v)
            and all(a < b for a, b in itertools.pairwise(v)))


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The noise scale shipped with a track: what is believed before anything was measured here."""

    sigma_d: float = _real(
        0.004, "standard deviation of a same-seed difference between two configurations, bpb", 0.0, 10.0,
        open_lo=True)
    sigma_run: float = _real(
        0.010, "standard deviation of one configuration over seeds, bpb", 0.0, 10.0, open_lo=True)
    df: float = _real(4.0, "degrees of freedom that the shipped scale counts for in the pool", 0.5, 100.0)
    inflation: float = _real(
        1.25, "factor on both shipped scales: they were measured elsewhere, so doubt them", 1.0, 10.0)
    spread: float = _real(
        0.7, "standard deviation of log sigma_d from edit to edit (used by simulation only)", 0.0, 3.0)
    source: str = _declare(
        "unspecified", "where sigma_d and sigma_run come from", "a non-empty text",
        lambda v: isinstance(v, str) and bool(v.strip()))

    @property
    def correlation(self) -> float:
        """Correlation of two same-seed runs that the scales imply: var(a-b) = 2 s^2 (1-rho)."""
        return 1.0 - self.sigma_d**2 / (2.0 * self.sigma_run**2)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """All choices behind a verdict. Gains and differences are in bpb, positive = candidate better."""

    track: str = _declare("default", "the section of gate.toml that this policy was read for",
                          "a non-empty text", lambda v: isinstance(v, str) and bool(v))
    alpha: float = _real(
        0.005, "one-sided chance, over all looks together, of keeping a change whose utility is exactly "
        "materiality_bpb", 0.0, 0.5, open_lo=True)
    spending: str = _declare(
        "pocock", "how alpha is spent over the looks (Lan-DeMets): obrien-fleming latest, pocock earliest",
        "one of " + ", ".join(SPENDINGS), lambda v: v in SPENDINGS)
    looks: tuple[int, ...] = _declare(
        (2, 4, 6, 8), "pair counts at which the gate looks", "1 to 12 increasing whole numbers, all >= 2",
        _increasing)
    controls: int = _whole(
        4, "incumbent runs in the bank before the first confirm; the least that the two-sample form uses",
        1, 1000)
    futility_power: float = _real(
        0.05, "stop early when the predictive chance of a keep at the last look is below this; 0 = never. "
        "Non-binding: the boundaries do not count on it", 0.0, 0.5)
    materiality_bpb: float = _real(
        0.001, "least utility worth a commit, bpb: the bound must lie above it", 0.0, 10.0)
    worse_alpha: float = _real(
        0.05, "one-sided level of the bounds that word a rejection (worse, immaterial); no part in keeping",
        0.0, 0.5, open_lo=True)
    noninferiority_bpb: float = _real(
        0.001, "a keep that rests on fewer bytes may lose at most this much bpb, by the same bound",
        0.0, 10.0)
    breadth_veto_sigmas: float = _real(
        1.0, "breadth rejects when worse by more than this many standard errors of the mean difference",
        0.0, 100.0)
    breadth_pairs: int = _whole(2, "pairs that breadth waits for before it judges", 1, 1000)
    shrink_df: float = _real(
        3.0, "degrees of freedom given to the pooled scale when a trial's own variance is shrunk towards it",
        0.5, 100.0)
    pool_clip: float = _real(
        2.0, "an earlier trial's deviation enters the pool at no more than this many inflated shipped "
        "sigmas: one exploding trial must not blind the gate to the next", 1.0, 1000.0)
    pool_df_cap: float = _real(60.0, "the pool never claims more degrees of freedom than this", 1.0, 10000.0)
    min_correlation: float = _real(
        0.3, "below this pooled same-seed correlation pairing is given up for the two-sample form", -1.0, 1.0)
    byte_margin_bytes: int = _whole(0, "bytes kept free under the cap beside the worst seed", 0, 10**9)
    byte_margin_fraction: float = _real(
        0.001, "the same as a fraction of the worst seed; the larger of the two margins counts", 0.0, 1.0)
    time_cap_ratio: float = _real(
        1.5, "hard limit on median step time, candidate / control", 0.0, 1000.0, open_lo=True)
    price_mb: float = _real(0.005, "lambda_B: bpb charged per 1,000,000 bytes more (credited when fewer)",
                            0.0, 1000.0)
    price_time: float = _real(0.0005, "lambda_T: bpb charged per 1% of step time beyond the dead band",
                              0.0, 10.0)
    time_deadband_pct: float = _real(2.0, "step time excess that is taken for timing noise, %", 0.0, 1000.0)
    time_credit: bool = _declare(
        False, "a candidate faster than the dead band is credited at price_time, as a slower one is charged",
        "true or false", lambda v: isinstance(v, bool))
    timing_pairs: int = _whole(
        0, "step times are compared over so many runs of incumbent and candidate side by side before a keep or "
        "a rejected.runtime; 0 = by the step times of the judged runs themselves", 0, 100)
    cheaper_bytes_fraction: float = _real(
        0.0, "kept.cheaper without a gain: non-inferior bpb and fewer bytes by at least this fraction of the "
        "track's cap; 0 = never", 0.0, 1.0)
    faster_pct: float = _real(
        0.0, "kept.faster without a gain: non-inferior bpb and step time shorter by at least this many % (every "
        "timing pair agreeing in sign); 0 = never", 0.0, 100.0)
    simpler_settings: int = _whole(
        0, "kept.simpler without a gain: non-inferior bpb and at least so many settings fewer; 0 = never", 0, 100)
    honest_pairs: int = _whole(
        0, "after a keep: fresh seeds on which it is measured again against its parent; 0 = never", 0, 1000)
    honest_extend: int = _whole(
        0, "fresh seeds added when the first ones say that the gain is below zero, before it is reverted", 0, 1000)
    bank_max: int = _whole(
        0, "idle workers grow the confirm bank to so many controls; trials then use its blocks in turn", 0, 10_000)
    early_fractions: tuple[float, ...] = _declare(
        (), "points of a breadth run (fraction of its steps) where it may be given up; none = never",
        "at most 8 increasing numbers between 0 and 1", lambda v: _fractions(v))
    early_nats: tuple[float, ...] = _declare(
        (), "at each of early_fractions: given up when its dev loss lies above the incumbent's, same step and seed, "
        "by more than this, nats/token", "as many numbers as early_fractions, each above 0",
        lambda v: isinstance(v, tuple) and all(isinstance(x, float) and 0.0 < x < 100.0 for x in v))
    for_tests_only: bool = _declare(
        False, "verdicts under this policy mean nothing, and say so", "true or false",
        lambda v: isinstance(v, bool))
    prior: Prior = field(default_factory=Prior, metadata={"doc": "shipped noise scale"})

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the canonical JSON of :meth:`to_dict`."""
        return hash_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the inverse of :func:`from_dict`."""
        data = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @property
    def max_pairs(self) -> int:
        """Pairs at the last look."""
        return self.looks[-1]


def hash_of(data: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a policy as recorded, without parsing it: fields added later change no old hash."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _coerce(f: dataclasses.Field[Any], value: Any) -> Any:
    """TOML and JSON spellings to the field's type: int -> float where a float is meant, list -> tuple."""
    if str(f.type) == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _build(cls: type[Any], data: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """``cls`` from ``data`` with every field checked. Raises PolicyError."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            raise PolicyError(f"{where}: unknown field {prefix}{name} = {data[name]!r}; "
                              f"valid fields: {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, raw in data.items():
        if name == "prior":
            if not isinstance(raw, Mapping):
                raise PolicyError(f"{where}: {prefix}prior = {raw!r}; valid: a table of "
                                  f"{', '.join(f.name for f in dataclasses.fields(Prior))}")
            values[name] = _build(Prior, raw, where, f"{prefix}prior.")
            continue
        value = _coerce(fields[name], raw)
        if not fields[name].metadata["test"](value):
            raise PolicyError(f"{where}: {prefix}{name} = {raw!r}; valid: {fields[name].metadata['valid']} "
                              f"({fields[name].metadata['doc']})")
        values[name] = value
    return cls(**values)


def from_dict(data: Mapping[str, Any], where: str = "recorded policy") -> Policy:
    """Rebuild a policy from :meth:`Policy.to_dict` (missing fields take their defaults).

    Raises PolicyError naming ``where``, the field, its value and what is valid.
    """
    policy: Policy = _build(Policy, data, where)
    if policy.prior.sigma_d > 2.0 * policy.prior.sigma_run:
        raise PolicyError(
            f"{where}: prior.sigma_d = {policy.prior.sigma_d:g} with prior.sigma_run = "
            f"{policy.prior.sigma_run:g}; valid: sigma_d at most 2 sigma_run (correlation >= -1)")
    if len(policy.early_nats) != len(policy.early_fractions):
        raise PolicyError(f"{where}: early_nats = {list(policy.early_nats)!r}; valid: one for each of early_fractions "
                          f"= {list(policy.early_fractions)!r}")
    return policy


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a policy file. Raises PolicyError when it can't be read or is no TOML."""
    try:
        with path.open("rb") as f:
            data = tomllib.load(f)
    except OSError as e:
        raise PolicyError(f"{path}: cannot read the gate policy ({e.strerror or e}); restore "
                          "harness/gate.toml or name another file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise PolicyError(f"{path}: not TOML ({e})") from e
    for name, table in data.items():
        if not isinstance(table, dict):
            raise PolicyError(f"{path}: {name} = {table!r} stands outside a section; "
                              "valid: [default] and one section per track")
    return data


def load_policy(track: str, path: Path | None = None) -> Policy:
    """The policy of ``track``: built-in defaults < ``[default]`` < ``[<track>]`` of the file.

    A track without a section of its own gets ``[default]``. Raises PolicyError.
    """
    path = path or POLICY_FILE
    sections = _sections(path)
    merged: dict[str, Any] = {"track": track}
    prior: dict[str, Any] = {}
    for name in dict.fromkeys(("default", track)):
        table = dict(sections.get(name, {}))
        if "track" in table:
            raise PolicyError(f"{path} [{name}]: track = {table['track']!r} is set by the section's name; "
                              "remove the line")
        own = table.pop("prior", {})
        _build(Policy, table | {"prior": own}, f"{path} [{name}]")
        prior |= own
        merged |= table
    return from_dict(merged | {"prior": prior}, f"{path} [{track}]")


def tracks(path: Path | None = None) -> list[str]:
    """Tracks that have a section of their own, in file order."""
    return [name for name in _sections(path or POLICY_FILE) if name != "default"]
