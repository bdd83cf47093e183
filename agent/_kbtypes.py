"""Typed records of the knowledge base; :mod:`agent.knowledge` re-exports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from trainer.knobs import KnobValue

Status = Literal["active", "parked", "integrated", "deferred"]
Verdict = Literal["kept", "rejected", "neutral", "invalid", "unclear"]
MoveKind = Literal["knobs", "ladder", "scale", "reshape", "combine", "simplify"]
Spacing = Literal["linear", "log", "one-minus-log"]
STATUSES: tuple[str, ...] = get_args(Status)
VERDICTS: tuple[str, ...] = get_args(Verdict)
MOVE_KINDS: tuple[str, ...] = get_args(MoveKind)
SPACINGS: tuple[str, ...] = get_args(Spacing)
TEMPLATE_FIELDS = frozenset({"change", "bpb", "track"})


class KnowledgeError(ValueError):
    """The knowledge base cannot be used as it is; the message names file, block and field."""


@dataclass(frozen=True)
class Problem:
    """One defect found by ``lint``."""

    file: str
    block: str  # line id, evidence id, or "line 12"
    field: str  # "" when the whole block is meant
    message: str

    def __str__(self) -> str:
        where = " ".join(p for p in (self.block, self.field) if p)
        return f"{self.file}: {where}: {self.message}" if where else f"{self.file}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One experiment that was run before us. ``delta_bpb``: against ``base``; negative is better."""

    id: str
    base: str  # evidence id of what it was compared with; "" if none
    change: Mapping[str, KnobValue]
    regime: str
    metrics: Mapping[str, float]
    delta_bpb: float | None
    verdict: str
    source: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Where evidence was measured. ``weight`` in [0, 1]: how much it tells us about a small track."""

    id: str
    says: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Move:
    """One kind of step that a line allows. Exactly one of the payloads is set, by ``kind``."""

    kind: str
    knobs: Mapping[str, KnobValue] = field(default_factory=dict)  # kind knobs: set these
    ladder: str = ""  # kind ladder: climb this knob's rungs
    toward: str = ""  # up | down | "": where the evidence points
    spacing: str = "linear"  # how midpoints between two rungs are taken
    factors: Mapping[str, float] = field(default_factory=dict)  # kind scale: multiply these together
    vary: tuple[str, ...] = ()  # kind reshape: trade these at equal bytes
    bpb: float  # predicted change of val_bpb for one step; negative is better
    bytes_frac: float = 0.0  # predicted change of the artifact, as a fraction, beyond parameter count
    time_frac: float = 0.0  # predicted change of the step time, as a fraction, beyond matrix products
    why: str
    evidence: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every knob that this move may touch (none for combine and simplify)."""
        return (*self.knobs, *((self.ladder,) if self.ladder else ()), *self.factors, *self.vary)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One research line. ``priority``: our estimate of P(the next move is kept) on a small track."""

    id: str
    title: str
    status: str
    priority: float
    hypothesis: str  # template with {change}, {bpb}, {track}
    regime: str
    evidence: tuple[str, ...]
    moves: tuple[Move, ...]
    needs: tuple[str, ...] = ()
    page: str = ""


@dataclass(frozen=True)
class Page:
    """One page: file name, whole text, SHA-256 of its bytes in hex."""

    name: str
    text: str
    sha256: str


@dataclass(frozen=True)
class Knowledge:
    """A parsed knowledge base."""

    pages: Mapping[str, Page]
    lines: Mapping[str, Line]
    evidence: Mapping[str, Evidence]
    regimes: Mapping[str, Regime]

    def active(self) -> tuple[Line, ...]:
        """Active lines, in the order of the pages."""
        return tuple(line for line in self.lines.values() if line.status == "active")

    def cite(self, line_id: str) -> str:
        """How a proposal cites a line: ``kb/<page>#<line>@<first 12 hex digits of the page's hash>``."""
        page = self.pages[self.lines[line_id].page]
        return f"kb/{page.name}#{line_id}@{page.sha256[:12]}"

    def prior(self, line: Line) -> tuple[float, float]:
        """Beta prior (successes, failures) of a line.

        Its mean is the written priority. Its strength is 2 pseudo-trials plus the summed regime weights
        of the cited evidence, at most 6: the better a line is documented, the more a contrary
        outcome has to say before it is dropped, and the less an undocumented one is tried on luck alone.
        """
        strength = 2.0 + sum(self.regimes[self.evidence[e].regime].weight for e in line.evidence)
        strength = min(strength, 6.0)
        mean = min(max(line.priority, 0.01), 0.99)
        return mean * strength, (1 - mean) * strength
