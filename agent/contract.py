"""The Proposal: what every proposer (garden, LLM, person, optimiser) hands to the harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from trainer.knobs import KnobValue


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One hypothesis, one change. ``predicted`` maps val_bpb / bytes / step_time to signed changes
    (negative val_bpb is better; bytes in bytes; step_time as a fraction)."""

    line: str  # research line (kb/research_tracks.md block id), or "manual"
    hypothesis: str
    change: Mapping[str, KnobValue] = field(default_factory=dict)
    patch: str = ""  # unified diff; exclusive with change
    move: str = ""  # ladder | bracket | toggle | set | scale | reshape | combine | simplify | manual
    predicted: Mapping[str, float] = field(default_factory=dict)
    falsified_by: str = ""
    pages: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    retry_of: str = ""
    retry_because: str = ""

    @property
    def kind(self) -> str:
        """"knobs" or "patch"."""
        return "patch" if self.patch else "knobs"

    @property
    def hash(self) -> str:
        """SHA-256 of what is proposed (not of the words around it)."""
        text = json.dumps({"change": dict(self.change), "patch": self.patch}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PastTrial:
    """What a proposer needs to know of an earlier trial of the same track."""

    trial: str
    line: str
    move: str
    change: Mapping[str, KnobValue]
    parent_config: str
    config_hash: str
    verdict: str  # keep | reject | failed | refused
    reason: str
    delta_bpb: float | None  # candidate minus control; negative is better; None if never measured
    same_fingerprint: bool
    previous: Mapping[str, KnobValue] = field(default_factory=dict)  # its incumbent's values of those knobs


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything a proposer may look at. Built by the harness from ledger, recipe and track."""

    track: str
    search: str
    seed: int  # of the search
    number: int  # of the trial to propose, 1-based
    incumbent: Mapping[str, KnobValue]  # resolved knobs
    incumbent_config: str
    locked: frozenset[str]  # knobs that the track fixes
    history: tuple[PastTrial, ...]
    tried_configs: frozenset[str]  # configuration hashes already judged here (incumbent included)
    cap_bytes: int
    incumbent_bytes: int


class Exhausted(Exception):
    """A proposer has nothing left to propose in this context."""


class Proposer(Protocol):
    """``propose`` is deterministic in the context (or records what it drew on); it never measures."""

    name: str
    slow: bool  # thinks long enough for idle workers to be given something else meanwhile

    def propose(self, context: Context) -> Proposal: ...
