"""Proposers by name. Each gives one Proposal for one Context (see :mod:`agent.contract`)."""

from __future__ import annotations

from pathlib import Path

from agent.contract import Proposer
from agent.proposers.garden import Garden
from agent.proposers.manual import ManualError, manual_proposal

PLANNED = ("llm", "optuna")

__all__ = ["Garden", "ManualError", "ProposerError", "make_proposer", "manual_proposal"]


class ProposerError(ValueError):
    """An agent name that cannot be used."""


def make_proposer(name: str, kb_dir: Path) -> Proposer:
    """The proposer called ``name``, reading the knowledge base in ``kb_dir``.

    Raises ProposerError for a name that is unknown or not built yet, KnowledgeError for a broken base.
    """
    if name == Garden.name:
        return Garden(kb_dir)
    if name in PLANNED:
        raise ProposerError(f"agent {name!r} is not there yet: use --agent garden (offline, needs no key)")
    raise ProposerError(f"agent {name!r}: unknown; valid: garden (not there yet: {', '.join(PLANNED)})")
