"""What the records say: trials, the tree of kept commits, who leads. Pure functions, no I/O.

Figures are averaged and ranked only within one measurement fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ledger.decode import Record
from ledger.measured import TransferMeasured
from ledger.records import ControlEnded, SearchStarted
from ledger.trials import STATUSES, TrialView, select, total_bytes, trials

__all__ = [
    "STATUSES",
    "Best",
    "ControlMean",
    "Node",
    "TrialView",
    "best",
    "controls",
    "lineage",
    "select",
    "tail",
    "total_bytes",
    "transfers",
    "trials",
]


@dataclass(frozen=True)
class ControlMean:
    """Fresh measurements of a commit as incumbent, under one fingerprint."""

    fingerprint: str
    mean: float
    n: int


@dataclass
class Node:
    """A commit that was an incumbent.

    ``trial`` is None where no kept trial of the ledger made it: the base that a search began with, or, below
    a kept commit, one of a person's on top of it with the same configuration.
    """

    commit: str
    trial: TrialView | None = None
    controls: tuple[ControlMean, ...] = ()
    attempts: list[TrialView] = field(default_factory=list)  # tried on it and not kept
    children: list[Node] = field(default_factory=list)  # kept on it

    def walk(self) -> Iterator[Node]:
        """This node and all below, parents first. Safe for lines of any length."""
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))

    def fresh(self, fingerprint: str) -> ControlMean | None:
        """Its control mean under ``fingerprint``, if it was measured as incumbent there."""
        return next((item for item in self.controls if item.fingerprint == fingerprint), None)


def lineage(records: Iterable[Record], search: str | None = None) -> list[Node]:
    """The forest of kept commits: one root for every base, attempts that were not kept beneath their parent.

    A keep whose commit is not settled yet hangs under its parent as "<search>/<trial>". Without ``search``,
    searches that began at the same commit share its root.
    """
    items = list(records)
    views = trials(items, search)
    # A commit that took a keep back is its parent again.
    same = {view.revert: view.parent_commit for view in views if view.revert}
    measured = controls(items, search, same)
    kept = {_commit_name(view): view for view in views if view.status == "kept"}
    nodes = {name: Node(name, view, measured.get(name, ())) for name, view in kept.items()}
    roots: list[Node] = []
    made: dict[tuple[str, str], Node] = {}  # (search, configuration hash) -> the last keep so far that made it

    def base(commit: str, search: str, config: str) -> Node:
        commit = original(commit, same)
        if commit not in nodes:
            nodes[commit] = Node(commit, controls=measured.get(commit, ()))
            below = made.get((search, config))
            (below.children if below else roots).append(nodes[commit])
        return nodes[commit]

    # In the order of the ledger, so that nothing can come to stand beneath its own descendant.
    proposals = {view.first_seq: view for view in views}
    for record in items:
        body, view = record.body, proposals.get(record.seq)
        if isinstance(body, SearchStarted) and (search is None or record.search == search):
            base(body.incumbent_commit, record.search, body.incumbent_config)
        elif view is not None:
            parent = base(view.parent_commit, view.search, view.parent_config)
            if view.status == "kept":
                made[view.search, view.config_hash] = nodes[_commit_name(view)]
                parent.children.append(nodes[_commit_name(view)])
            else:
                parent.attempts.append(view)
    return roots


def original(commit: str, same: Mapping[str, str]) -> str:
    """``commit``, or what it brought back when it is a revert (of a revert, ...)."""
    while commit in same:
        commit = same[commit]
    return commit


def _commit_name(view: TrialView) -> str:
    return view.commit or f"{view.search}/{view.trial}"


def controls(
    records: Iterable[Record], search: str | None = None, same: Mapping[str, str] | None = None,
) -> dict[str, tuple[ControlMean, ...]]:
    """Commit -> mean confirm val_bpb of its control runs, per fingerprint (each run counted once).

    ``same``: revert commit -> the commit that it brought back; their runs are counted together, there.
    """
    seen: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        body = record.body
        if not isinstance(body, ControlEnded) or body.stage != "confirm":
            continue
        if search is None or record.search == search:
            by_fingerprint = seen.setdefault(original(body.incumbent_commit, same or {}), {})
            by_fingerprint.setdefault(body.fingerprint, {})[body.run.run_id] = body.run.val_bpb
    return {
        commit: tuple(ControlMean(name, fmean(runs.values()), len(runs)) for name, runs in groups.items())
        for commit, groups in seen.items()
    }


@dataclass(frozen=True, kw_only=True)
class Best:
    """The leader under one fingerprint."""

    track: str
    fingerprint: str
    commit: str
    trial: TrialView | None  # None: the base that the search began with
    val_bpb: float
    runs: int
    fresh: bool  # measured again as incumbent; otherwise the figure that won the selection, which flatters
    claimed_gain: float  # sum of the paired gains along its line of keeps, bpb, positive = better
    honest_gain: float | None  # fresh mean of the line's base minus fresh mean of the leader
    paired_gain: float | None = None  # sum of its keeps' gains on fresh seeds, None where one was not measured again
    paired_se: float | None = None


def best(records: Iterable[Record], track: str | None = None, search: str | None = None) -> list[Best]:
    """The leader of every fingerprint, by fresh control mean where there is one.

    A selected score flatters (winner's curse): a commit that was never measured again shows its winning
    figure, marked as not ``fresh``, and never outranks one that was.
    """
    items = list(records)
    tracks: dict[str, str] = {}
    for record in items:
        body = record.body
        if isinstance(body, SearchStarted) and (search is None or record.search == search):
            tracks[body.fingerprint] = body.track
    forest = lineage(items, search)
    leaders: list[Best] = []
    for fingerprint, name in tracks.items():
        found = [leader for root in forest for leader in _candidates(root, fingerprint, name)]
        if found and track in (None, name):
            leaders.append(min(found, key=lambda leader: (not leader.fresh, leader.val_bpb)))
    return leaders


def _candidates(root: Node, fingerprint: str, track: str) -> Iterator[Best]:
    """Every commit under ``root`` that has a figure under ``fingerprint``."""
    base = root.fresh(fingerprint)
    stack: list[tuple[Node, float, tuple[float, float] | None]] = [(root, 0.0, (0.0, 0.0))]
    while stack:
        node, claimed, paired = stack.pop()
        view = node.trial if node.trial and node.trial.fingerprint == fingerprint else None
        if view and view.delta_bpb is not None:
            claimed -= view.delta_bpb
        if node.trial is not None:
            paired = _add_honest(paired, node.trial)
        stack += [(child, claimed, paired) for child in node.children]
        own = node.fresh(fingerprint)
        figure = own.mean if own else (view.candidate_bpb if view else None)
        if figure is None:
            continue
        yield Best(
            track=track,
            fingerprint=fingerprint,
            commit=node.commit,
            trial=node.trial,
            val_bpb=figure,
            runs=own.n if own else (view.pairs if view else 0),
            fresh=own is not None,
            claimed_gain=claimed,
            honest_gain=base.mean - own.mean if base and own else None,
            paired_gain=paired[0] if paired and node.trial else None,
            paired_se=math.sqrt(paired[1]) if paired and node.trial else None,
        )


def _add_honest(paired: tuple[float, float] | None, view: TrialView) -> tuple[float, float] | None:
    """(gain, variance) along a line of keeps, this one added; None once one of them was not measured again."""
    if paired is None or view.honest_gain is None or view.honest_se is None:
        return None
    return paired[0] + view.honest_gain, paired[1] + view.honest_se**2


def transfers(records: Iterable[Record]) -> dict[str, list[TransferMeasured]]:
    """Subject (trial id, or "stack of SEARCH") -> what was measured of it on other tracks, oldest first.

    A measurement that was extended to more pairs holds the earlier one's, and takes its place.
    """
    found: dict[tuple[str, str, str, str, str], TransferMeasured] = {}
    for record in records:
        body = record.body
        if isinstance(body, TransferMeasured):
            found[body.subject, body.track, body.fingerprint, body.base_config, body.config_hash] = body
    out: dict[str, list[TransferMeasured]] = {}
    for body in found.values():
        out.setdefault(body.subject, []).append(body)
    return out


def tail(records: Iterable[Record], n: int) -> Sequence[Record]:
    """The last ``n`` records, oldest first."""
    items = list(records)
    return items[-n:] if n > 0 else []
