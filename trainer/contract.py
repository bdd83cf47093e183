"""What goes into a run and what comes out: frozen, JSON, no torch.

Two processes make one measurement. The *trainer* reads a :class:`RunSpec`, never sees validation
text, and leaves an artifact and a :class:`RunResult`. The *referee* reads a :class:`ScoreSpec`,
which names that artifact, and leaves a :class:`ScoreResult`: the only place where a val_bpb comes from.

Files in a run folder (names declared here, nowhere else):
``spec.json``, ``events.jsonl``, ``result.json``, ``artifact.bin``, ``score_spec.json``, ``score.json``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

SPEC_FILE = "spec.json"
EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"
ARTIFACT_FILE = "artifact.bin"
SCORE_SPEC_FILE = "score_spec.json"
SCORE_FILE = "score.json"
LOG_FILE = "log.txt"

KnobValue = bool | int | float | str
Split = Literal["dev", "val", "holdout"]

EVENT_KINDS: dict[str, str] = {
    "started": "first line: trainer_path, tree_hash, torch, device, params, steps",
    "step": "step (1-based), of, train_loss (nats/token), lr_scale, tokens, elapsed_s (training clock)",
    "dev": "step, dev_loss (nats/token on the dev slice, the float model, no roundtrip), tokens (targets scored)",
    "phase": "name: data | compile | train | export | load | score",
    "score": "windows done, of (referee only)",
    "finished": "last line of a run that wrote its result",
    "failed": "reason (a FailureKind), error: one line; last line of a run that could not go on",
}
"""Every event of the stream ``events.jsonl``: kind -> fields. Each line is
``{"t": <unix seconds>, "kind": <kind>, ...fields}`` and is flushed at once: it is the heartbeat."""

FailureKind = Literal["crash", "oom", "nan", "timeout", "hang", "export", "infra"]


class ContractError(ValueError):
    """A spec or result file that does not say what the contract asks for."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run. Paths are absolute. ``knobs`` holds *every* declared knob, resolved."""

    run_id: str
    seed: int  # 0 <= seed < 2**63; fixes initialisation (by hash(seed, name)) and data order
    knobs: Mapping[str, KnobValue]
    data_dir: str  # folder with manifest.json, shards and tokenizer; only train shards are opened
    out_dir: str
    device: str = "cpu"  # "cpu" | "cuda" | "cuda:N"
    threads: int = 1  # intra-op CPU threads; part of the fingerprint
    deterministic: bool = True
    compile: bool = False  # torch.compile over the step (CUDA)
    log_every: int = 1  # steps between "step" events
    dev_every: int = 0  # steps between "dev" events, which change nothing in the run; 0 = none
    dev_tokens: int = 0  # tokens of the dev slice that a "dev" event scores; 0 = all


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished training run measured about itself. It carries no val_bpb, on purpose."""

    run_id: str
    seed: int
    steps: int
    tokens: int  # training tokens seen
    params: int
    train_seconds: float  # the training clock: steps only, without start-up, compilation and export
    setup_seconds: float  # process start to first step
    export_seconds: float
    step_ms: float  # median cost of a step, milliseconds: wall time on CUDA, the process's CPU time on a CPU
    final_train_loss: float  # nats/token, mean of the last 10% of steps (at least one)
    artifact_path: str
    artifact_bytes: int
    artifact_sha256: str
    code_bytes: int  # see trainer.export.codesize: what a self-contained script would weigh
    peak_memory_bytes: int  # resident set on CPU, allocator peak on CUDA
    tree_hash: str  # hash of the trainer package that was imported
    torch_version: str
    device_name: str
    payload_bytes: int = 0  # the artifact before compression; 0: not reported
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """One scoring by the referee: artifact in, bits per byte out."""

    run_id: str
    artifact_path: str
    artifact_sha256: str  # refused when the file differs
    data_dir: str
    out_dir: str
    split: Split = "val"
    max_tokens: int = 0  # 0 = the whole split; else truncated before the floor to whole windows
    seq_len: int = 1024
    batch_seqs: int = 32
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """The referee's figures. bpb = (loss / ln 2) * tokens / bytes (challenge_spec, section 2)."""

    run_id: str
    split: Split
    val_loss: float  # nats/token
    val_bpb: float
    tokens: int  # predicted targets
    bytes: int  # bytes of normalised text that those targets stand for
    eval_seconds: float
    artifact_sha256: str
    evaluator_hash: str  # hash of the protected files that computed this
    data_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Written to result.json or score.json in place of a result when the process could tell why."""

    run_id: str
    failure: FailureKind
    error: str


T = TypeVar("T", RunSpec, RunResult, ScoreSpec, ScoreResult, Failure)


def _check(name: str, hint: Any, value: Any) -> Any:
    """Return ``value`` if it fits the annotation ``hint``, widened int -> float; else raise."""
    origin = typing.get_origin(hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if origin is Literal:
        ok = value in typing.get_args(hint)
    elif origin in (Mapping, dict) or getattr(origin, "__name__", "") == "Mapping":
        ok = isinstance(value, dict)
    elif origin in (typing.Union, types.UnionType):
        ok = isinstance(value, typing.get_args(hint))
    else:
        ok = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not ok:
        raise ContractError(f"{name} = {value!r}: expected {getattr(hint, '__name__', hint)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ContractError(f"{name} = {value!r}: a non-finite number is a failure, not a value")
    return value


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build ``cls`` from parsed JSON. Unknown, missing or mistyped fields raise ContractError."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ContractError(f"{cls.__name__}: unknown field(s) {', '.join(unknown)}")
    missing = [
        n for n, f in fields.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ContractError(f"{cls.__name__}: missing field(s) {', '.join(missing)}")
    return cls(**{n: _check(f"{cls.__name__}.{n}", hints[n], v) for n, v in data.items()})


def dump(obj: RunSpec | RunResult | ScoreSpec | ScoreResult | Failure, path: Path) -> None:
    """Write as JSON, atomically and durably: a reader sees the whole file or none."""
    text = json.dumps(dataclasses.asdict(obj), indent=1, sort_keys=True, allow_nan=False)
    tmp = path.with_name(path.name + f".tmp{os.getpid()}")
    with tmp.open("w", encoding="utf-8") as f:
        f.write(text + "\n")
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(path)


def load(cls: type[T], path: Path) -> T:
    """Read what :func:`dump` wrote. Raises ContractError naming file and field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ContractError(f"{path}: {e.strerror or e}") from e
    except ValueError as e:
        raise ContractError(f"{path}: not JSON ({e})") from e
    if not isinstance(data, dict):
        raise ContractError(f"{path}: expected a JSON object")
    try:
        return from_dict(cls, data)
    except ContractError as e:
        raise ContractError(f"{path}: {e}") from None


def load_outcome(cls: type[T], path: Path) -> T | Failure:
    """Read a result file that may hold a :class:`Failure` instead."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ContractError(f"{path}: {e}") from e
    if isinstance(data, dict) and "failure" in data:
        return from_dict(Failure, data)
    return load(cls, path)
