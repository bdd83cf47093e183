"""Shared by the agent tests: contexts, past trials and a small knowledge base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from agent.contract import Context, PastTrial
from trainer.knobs import REGISTRY, KnobValue

REPO_ROOT = Path(__file__).resolve().parents[2]
KB = REPO_ROOT / "kb"
POCKET: dict[str, KnobValue] = {
    "vocab_size": 1024, "train_seq_len": 128, "train_batch_tokens": 2048, "loader": "shuffled",
    "keep_float_max_numel": 4096, "num_layers": 5, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2,
}
LOCKED = frozenset({
    "vocab_size", "train_seq_len", "train_batch_tokens", "loader", "keep_float_max_numel", "iterations",
    "max_wallclock_seconds", "micro_batch_tokens", "container",
})


def context(
    *, seed: int = 0, number: int = 1, change: Mapping[str, KnobValue] | None = None,
    history: Iterable[PastTrial] = (), tried: Iterable[str] = (), locked: frozenset[str] = LOCKED,
    incumbent_bytes: int = 560_000, cap_bytes: int = 700_000,
) -> Context:
    """A pocket-like context whose incumbent differs from the plain baseline by ``change``."""
    incumbent = REGISTRY.resolve(POCKET, change or {})
    config = REGISTRY.config_hash(incumbent)
    return Context(
        track="pocket", search="test", seed=seed, number=number, incumbent=incumbent, incumbent_config=config,
        locked=locked, history=tuple(history), tried_configs=frozenset(tried) | {config},
        cap_bytes=cap_bytes, incumbent_bytes=incumbent_bytes,
    )


def past(
    trial: str, line: str, change: Mapping[str, KnobValue], verdict: str = "reject", reason: str = "rejected.worse",
    delta: float | None = 0.01, *, same: bool = True, move: str = "ladder",
    previous: Mapping[str, KnobValue] | None = None,
) -> PastTrial:
    """One finished trial."""
    return PastTrial(
        trial=trial, line=line, move=move, change=change, parent_config="", config_hash=f"hash-{trial}",
        verdict=verdict, reason=reason, delta_bpb=delta, same_fingerprint=same, previous=previous or {},
    )


REGIMES = '[regimes.lab]\nsays = "a bench"\nweight = 0.5\n'
LINE = """
id = "{id}"
title = "T"
status = "active"
priority = 0.5
hypothesis = "{{change}} on {{track}}: {{bpb}}"
regime = "r"
evidence = ["src.one"]
[[moves]]
{move}
bpb = -0.01
why = "w"
"""
RECORD = {
    "id": "src.one", "base": "", "change": {"beta2": 0.99}, "regime": "lab",
    "metrics": {"val_bpb": 2.12345678, "bytes": 1234567}, "delta_bpb": -0.0123, "verdict": "kept",
    "source": "s", "note": "",
}


def line_block(move: str = 'ladder = "beta2"', name: str = "one") -> str:
    """The text of one line's toml block, without fences."""
    return LINE.format(id=name, move=move)


def write_kb(
    folder: Path, blocks: Iterable[str] = (), *, records: Iterable[object] = (RECORD,), prose: str = "",
    regimes: str = REGIMES,
) -> Path:
    """A knowledge base in ``folder``: blocks become fenced toml in research_tracks.md."""
    folder.mkdir(parents=True, exist_ok=True)
    fenced = "\n".join(f"```toml\n{b.strip()}\n```\n" for b in blocks)
    (folder / "research_tracks.md").write_text(f"# Lines\n\n{prose}\n\n{fenced}", encoding="utf-8")
    (folder / "README.md").write_text(f"# KB\n\n```toml\n{regimes}```\n", encoding="utf-8")
    rows = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "evidence.jsonl").write_text("".join(r + "\n" for r in rows), encoding="utf-8")
    return folder
