"""``autoresearch gate``: ask the gate why, what its error rates are, and what another policy would have said."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.common import JsonOption, WorkspaceOption, guard, print_json, whole, workspace
from harness.errors import UserError
from harness.output import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from harness.gate.design import Basis, Choice, Goal
    from harness.gate.replay import Replayed
    from harness.workspace import Workspace

app = typer.Typer(no_args_is_help=True, help="Explain verdicts, show the policy, its error rates, and other policies'.")

TrackOption = Annotated[str, typer.Option("--track", "-t", help="Measurement protocol (see `track list`).")]
PICTURES = (".png", ".svg", ".pdf")
ROWS = 12  # of the table of designs
DESIGN_NOTE = """\
* meets every target. P(keep) once confirm is reached: null, edge = at a gain of 0 and of materiality, over the spread
of noise; power, spread = at the target gain, typical noise and over the spread. cost: lengths of a confirm run, spent
on breadth and confirm per true gain kept, when 1 proposal in 10 is one. These are the best of all combinations, tried
again on fresh draws. A policy is set in harness/gate.toml."""


@app.command(epilog="Example: autoresearch gate explain pocket-0003")
@guard
def explain(trial: Annotated[str, typer.Argument(help="Trial id.")], where: WorkspaceOption = None) -> None:
    """Why a trial was kept or rejected, in plain words, with every figure."""
    from harness.gate.explain import explain as words
    from ledger.records import Decided
    from ledger.store import Ledger
    from ledger.summary import summarise

    ws = workspace(where)
    found = [r.body for r in Ledger(ws.ledger).records(types=["decided"], trial=trial)]
    if not found:
        raise UserError(f"{trial}: no verdict with that trial id in {ws.ledger} (see `autoresearch ledger show`)")
    body = found[-1]
    assert isinstance(body, Decided)
    print(words(body))
    for record in Ledger(ws.ledger).records(types=["honest.measured", "trial.reverted"], trial=trial):
        print(f"then: {summarise(record)}")


@app.command(epilog="Example: autoresearch gate show --track pocket")
@guard
def show(track: TrackOption = "pocket", json_: JsonOption = False) -> None:
    """A track's policy: every field, its value, where that comes from, and what it means."""
    from rich.markup import escape
    from rich.table import Table

    from harness.gate.policy import POLICY_FILE, load_policy
    from harness.report import console

    section = _section(track)
    policy = load_policy(section)
    rows = _policy_rows(policy, section, _tables(POLICY_FILE))
    if json_:
        print_json({"track": track, "section": section, "hash": policy.hash, "fields": rows})
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for head, width in (("field", None), ("value", 24), ("from", None), ("meaning", None)):
        table.add_column(head, overflow="fold", no_wrap=head in ("field", "from"), max_width=width)
    for row in rows:
        table.add_row(*(escape(t) for t in (row["field"], _plain(row["value"]), row["from"], row["meaning"])))
    console().print(table)
    print(f"\nPolicy {policy.hash[:12]} of track {track}, from {POLICY_FILE.name} [{section}] over [default] over the "
          "built-in defaults. Gains in bpb, positive = the candidate is better.")


def _section(track: str) -> str:
    """The policy section that judges a declared track. Raises UserError."""
    from harness.tracks import declared_track

    return declared_track(track).policy_track


def _tables(path: Path) -> dict[str, Any]:
    """The policy file's tables; it has been loaded, so it is valid."""
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def _policy_rows(policy: Any, section: str, tables: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per field; those of the noise prior as ``prior.NAME``."""
    def rows(value: Any, prefix: str, own: dict[str, Any], default: dict[str, Any]) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if dataclasses.is_dataclass(item):
                out += rows(item, f"{f.name}.", own.get(f.name, {}), default.get(f.name, {}))
            elif f.name != "track":
                origin = f"[{section}]" if f.name in own else "[default]" if f.name in default else "built in"
                out.append({"field": prefix + f.name, "value": list(item) if isinstance(item, tuple) else item,
                            "from": origin, "meaning": f.metadata["doc"], "valid": f.metadata["valid"]})
        return out

    return rows(policy, "", tables.get(section, {}), tables.get("default", {}))


def _plain(value: Any) -> str:
    """A value as it stands in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@app.command(epilog="Example: autoresearch gate simulate --track pocket --plot rates.png")
@guard
def simulate(
    track: TrackOption = "pocket",
    design: Annotated[
        bool, typer.Option("--design", help="Try many policies: the cheapest that meet the targets.")
    ] = False,
    target: Annotated[
        float | None, typer.Option("--target", metavar="BPB", help="True gain not to be missed. Default: 2 sigma.")
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", parser=whole(1000, 10_000_000), metavar="N", help="Simulated trials per rate.")
    ] = 100_000,
    seed: Annotated[int, typer.Option("--seed", parser=whole(0), metavar="N", help="Seed of the simulation.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw power, cost and false keeps.")
    ] = None,
    ship: Annotated[
        bool, typer.Option("--shipped", help="Use the policy's shipped noise even if the ledger has its own.")
    ] = False,
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """Error rates of a track's policy, by simulation: false keeps, power, runs; with --design, of many policies."""
    from harness.gate import design as designs
    from harness.gate.policy import load_policy
    from harness.gate.simulate import summary, typical_sigma

    gain = _positive(target)
    _check_picture(plot)
    basis = _basis(track, workspace(where), ship)
    policy, sigma = basis.policy, typical_sigma(basis.policy)
    gain = gain or designs.target_gain(policy)
    now = designs.achieved(basis, gain, trials=trials, seed=seed)
    rates = {name: summary(policy, gain, trials=trials, seed=seed + i, sigma=s, noise=basis.noise)
             for i, (name, s) in enumerate((("spread", None), ("typical", sigma), ("noisy", 3.0 * sigma)))}
    own = designs.own_effects(basis, trials=trials, seed=seed) if basis.effects else None
    if design:
        say("trying some thousands of policies: half a minute or so", sys.stderr)
    choices = designs.design(basis, gain, trials=max(1000, trials // 5), seed=seed) if design else None
    if plot:
        from harness.gate.plots import curves, rates_picture

        _save(rates_picture(basis, curves(basis, trials=min(trials, 20_000), seed=seed)), plot)
    if json_:
        print_json({
            "track": track, "policy_hash": load_policy(_section(track)).hash, "sigma": sigma,
            "target_gain": gain, "trials": trials, "seed": seed, "noise": basis.source, "noise_trials": basis.trials,
            "noise_words": basis.words, "now": dataclasses.asdict(now), "own_effects": own,
            "rates": {name: dataclasses.asdict(s) for name, s in rates.items()},
            "goals": [dataclasses.asdict(g) for g in designs.goals(now)],
            "design": None if choices is None else [dataclasses.asdict(c) for c in choices],
        })
        return
    _print_rates(track, basis, sigma, gain, rates, designs.goals(now), own)
    if choices is not None:
        _print_choices(choices)
    if plot:
        print(f"\nwrote {plot}")


def _positive(target: float | None) -> float | None:
    import math

    if target is not None and not (math.isfinite(target) and 0.0 < target < 10.0):
        raise UserError(f"--target {target:g}: expected a gain in bpb above 0 and below 10, for example --target 0.01")
    return target


def _check_picture(plot: Path | None) -> None:
    """Before anything is computed: can a picture be made there? Raises UserError."""
    if plot is None:
        return
    if plot.suffix.lower() not in PICTURES:
        raise UserError(f"--plot {plot}: expected a file name that ends in {', '.join(PICTURES)}")
    if not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: no such folder: {plot.absolute().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib, which is not installed here: `make setup`, or pip install "
                        "matplotlib") from None


def _save(picture: Figure, path: Path) -> None:
    picture.savefig(path)


def _basis(track: str, ws: Workspace, ship: bool) -> Basis:
    """Shipped noise, or the ledger's own where there is enough of it."""
    from harness.gate.design import basis
    from harness.gate.policy import load_policy
    from harness.gate.replay import measured
    from ledger.store import Ledger

    policy = load_policy(_section(track))
    if ship or not ws.ledger.is_file():
        return basis(policy)
    return basis(policy, *measured(Ledger(ws.ledger).records(), track))


def _print_rates(
    track: str, basis: Basis, sigma: float, gain: float, rates: dict[str, Any], goals: list[Goal],
    own: dict[str, float] | None,
) -> None:
    from harness.gate.noise import form
    from harness.report import console

    p = basis.policy
    print(f"{track}: looks {', '.join(map(str, p.looks))}; alpha {p.alpha:g} ({p.spending}); materiality "
          f"{p.materiality_bpb:g} bpb; {form(p, basis.noise)}; typical sigma {sigma:.5f}, target gain {gain:.5f} bpb")
    print(f"noise: {basis.words}\n")
    if p.for_tests_only:
        print("a track for tests: its verdicts mean nothing, and neither do these rates\n")
    table = _table("edits of", "no gain", "at materiality", "at target", "runs", "1 sigma", "2 sigma", "3 sigma")
    for name, words in (("spread", "the track's spread of noise"), ("typical", "typical noise"),
                        ("noisy", "3 x typical noise")):
        s = rates[name]
        table.add_row(words, f"{s.null.p_keep:.3%}", f"{s.at_materiality.p_keep:.3%}", f"{s.target.p_keep:.1%}",
                      f"{s.target.runs:.1f}", *(f"{r.p_keep:.1%} ({r.runs:.1f})" for r in s.powers))
    console().print(table)
    print("P(keep), given that confirm is reached; in brackets and under runs: mean candidate confirm runs; sigmas are "
          "those of the row's edits\n")
    for goal in goals:
        print(f"  {'met    ' if goal.met else 'NOT MET'}  {goal.words}")
    if own:
        print(f"\nover the ledger's own {len(basis.effects)} effects, shrunk: {own['p_keep']:.0%} kept (of those above "
              f"materiality {own['p_keep_real']:.0%}), {own['false_share']:.1%} of keeps without a gain, "
              f"{own['runs']:.1f} candidate runs a trial")


def _print_choices(choices: list[Choice]) -> None:
    from harness.report import console

    table = _table("", "looks", "alpha", "spending", "shrink", "futile", "veto", "null", "edge", "power", "spread",
                   "runs", "false", "cost")
    for c in [c for i, c in enumerate(choices) if i < ROWS or c.today]:
        mark = ("today" if c.today else "") + (" *" if c.meets else "")
        table.add_row(
            mark.strip(), " ".join(map(str, c.looks)), f"{c.alpha:g}", c.spending, f"{c.shrink_df:g}",
            f"{c.futility_power:g}", f"{c.breadth_veto_sigmas:g}", f"{c.null_keep:.2%}", f"{c.edge_keep:.2%}",
            f"{c.power:.1%}", f"{c.power_spread:.1%}", f"{c.power_runs:.1f}", f"{c.false_share:.1%}",
            f"{c.cost_per_keep:.1f}", style="bold" if c.today else "")
    print()
    console().print(table)
    print(DESIGN_NOTE)


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1 if len(heads) > 10 else 2, 0, 0), pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "edits of", "looks", "spending") else "right",
                         overflow="fold")
    return table


@app.command(epilog="Example: autoresearch gate replay --policy stricter.toml")
@guard
def replay(
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="A policy file. Default: today's harness/gate.toml.")
    ] = None,
    track: Annotated[str | None, typer.Option("--track", "-t", help="Only this track.")] = None,
    search: Annotated[str | None, typer.Option("--search", help="Only this search.")] = None,
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """Judge every recorded verdict again under another policy, from its own figures. Writes nothing."""
    from harness.gate.policy import POLICY_FILE, load_policy
    from harness.gate.replay import cases
    from harness.gate.replay import replay as judge
    from ledger.store import Ledger

    ws, path = workspace(where), policy or POLICY_FILE
    load_policy("default", path)  # a bad file is refused even when there is nothing to judge
    if track is not None:
        _section(track)
    if not ws.ledger.is_file():
        raise UserError(f"{ws.ledger}: no ledger yet; `autoresearch search` or `autoresearch demo` starts one")
    found = [c for c in cases(Ledger(ws.ledger).records()) if track in (None, c.track) and search in (None, c.search)]
    if not found:
        asked = " ".join(f"--{k} {v}" for k, v in (("track", track), ("search", search)) if v)
        raise UserError(f"{asked or ws.ledger}: no verdict to judge again (see `autoresearch ledger show`)")
    rows = judge(found, lambda section: load_policy(section, path))
    if json_:
        print_json([{**dataclasses.asdict(r), "changed": r.changed} for r in rows])
    else:
        _print_replay(rows, path)


def _print_replay(rows: list[Replayed], path: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from harness.gate.replay import CAVEATS
    from harness.report import console

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for head in ("trial", "recorded", "pairs", f"under {escape(path.name)}", "pairs", "what differs"):
        table.add_column(head, justify="right" if head == "pairs" else "left", overflow="fold")
    for r in rows:
        style = {"keep": "green", "undecided": "yellow"}.get(r.verdict, "") if r.changed else "dim"
        table.add_row(r.trial, r.recorded_reason, str(r.recorded_pairs or "-"), r.reason or r.verdict,
                      str(r.pairs or "-"), escape(r.detail), style=style)
    console().print(table)
    open_ = sum(r.verdict == "undecided" for r in rows)
    pooled = sum(r.noise == "re-pooled" for r in rows)
    print(f"\n{len(rows)} verdicts: {sum(r.recorded == 'keep' for r in rows)} keeps recorded, "
          f"{sum(r.verdict == 'keep' for r in rows)} replayed; {sum(r.changed for r in rows)} differ, of which {open_} "
          f"need figures that were not measured.")
    print("noise: " + (f"pooled again under this policy's prior, in ledger order, for {pooled} of them"
                       if pooled else "as recorded, since this policy pools it in the same way"))
    for caveat in CAVEATS:
        print(f"note: {caveat}")
