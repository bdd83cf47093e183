"""The referee: artifact in, bits per byte out.  Protected: candidates cannot change it.

``python -P -m trainer score SPEC`` ends here. Everything that a figure rests on (the artifact's
hash, the validation tokens, the byte table, targets, normalisation, the clock) is this side's; the
model gets windows of ids and gives back logits. The model comes from the artifact alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trainer.contract import (
    EVENTS_FILE,
    SCORE_FILE,
    ContractError,
    Failure,
    FailureKind,
    KnobValue,
    ScoreResult,
    ScoreSpec,
    dump,
    load,
)
from trainer.data.bytecount import ByteTable
from trainer.data.errors import DataError
from trainer.data.layout import open_folder
from trainer.data.loader import eval_tokens
from trainer.data.manifest import ManifestError, file_sha256
from trainer.evaluate import EvaluationError, NonFiniteLogitsError, PlayerError, evaluate
from trainer.export.errors import ArtifactError
from trainer.tree import TreeError, evaluator_hash

EXIT_SCORED, EXIT_BAD_SPEC, EXIT_FAILED = 0, 2, 3

_PROGRESS_SECONDS = 0.5  # at most this often, so that fast scoring does not flood the stream
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class InfrastructureError(RuntimeError):
    """The machine, not the artifact, is why nothing could be scored."""


def main_score(spec_path: Path) -> int:
    """Score what ``spec_path`` (a ScoreSpec) names and leave ``score.json`` in its ``out_dir``.

    Returns 0 when that file holds a ScoreResult; 3 when it holds a Failure: "export" (the artifact
    cannot be read, is not the one announced, or cannot be rebuilt), "nan" (logits not finite), "oom",
    "infra" (data folder or device unusable), "crash" (anything else); 2 when the spec is bad, with a
    line on stderr and no file. A score.json from an earlier attempt is removed first.
    """
    try:
        spec = load(ScoreSpec, spec_path)
        _check_spec(spec)
        out_dir = Path(spec.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / SCORE_FILE).unlink(missing_ok=True)
    except (ContractError, OSError) as e:
        print(f"score: {e}", file=sys.stderr)
        return EXIT_BAD_SPEC
    with (out_dir / EVENTS_FILE).open("a", encoding="utf-8") as stream:
        events = _Events(stream)
        outcome = _attempt(spec, events)
        dump(outcome, out_dir / SCORE_FILE)
        if isinstance(outcome, Failure):
            events.emit("failed", reason=outcome.failure, error=outcome.error)
            print(f"score: {outcome.failure}: {outcome.error}", file=sys.stderr)
            return EXIT_FAILED
        events.emit("finished")
    return EXIT_SCORED


def _check_spec(spec: ScoreSpec) -> None:
    """Values that the contract's types let through."""
    for name, value, low in (
        ("seq_len", spec.seq_len, 1), ("batch_seqs", spec.batch_seqs, 1), ("threads", spec.threads, 1),
        ("max_tokens", spec.max_tokens, 0),
    ):
        if value < low:
            raise ContractError(f"ScoreSpec.{name} = {value}: expected {low} or more")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", spec.device):
        raise ContractError(f"ScoreSpec.device = {spec.device!r}: expected cpu, cuda or cuda:N")
    if not re.fullmatch(r"[0-9a-f]{64}", spec.artifact_sha256):
        raise ContractError(f"ScoreSpec.artifact_sha256 = {spec.artifact_sha256!r}: expected 64 hex digits")


class _Events:
    """Appends to the event stream; each line is flushed at once, being the heartbeat."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._last = float("-inf")

    def emit(self, kind: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"t": time.time(), "kind": kind, **fields}) + "\n")
        self._stream.flush()

    def windows(self, done: int, of: int) -> None:
        """Progress, not more often than every half second, the last window always."""
        now = time.monotonic()
        if done == of or now - self._last >= _PROGRESS_SECONDS:
            self._last = now
            self.emit("score", windows=done, of=of)


def _attempt(spec: ScoreSpec, events: _Events) -> ScoreResult | Failure:
    """Score, or say which kind of failure it was: the process boundary."""
    kind: FailureKind
    try:
        with _settings(spec):
            return _score(spec, events)
    except ArtifactError as e:
        kind, error = "export", e
    except NonFiniteLogitsError as e:
        kind, error = "nan", e
    except PlayerError as e:
        kind, error = "crash", e
    except (DataError, EvaluationError, TreeError, InfrastructureError, OSError) as e:
        kind, error = "infra", e
    except MemoryError as e:
        kind, error = "oom", e
    except Exception as e:
        out_of_memory = isinstance(e, torch.OutOfMemoryError) or bool(_NO_MEMORY.search(str(e)))
        kind, error = ("oom" if out_of_memory else "crash"), e
        traceback.print_exc()
    text = " ".join(str(error).split()) or type(error).__name__
    if kind == "crash":
        text = f"{type(error).__name__}: {text}"
    return Failure(run_id=spec.run_id, failure=kind, error=text[:1000])


@contextlib.contextmanager
def _settings(spec: ScoreSpec) -> Iterator[None]:
    """Thread count and deterministic kernels for the duration of a scoring."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    # cuBLAS reads this when it starts: without a fixed workspace its results may differ between runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(spec.threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _score(spec: ScoreSpec, events: _Events) -> ScoreResult:
    events.emit("phase", name="data")
    table, tokens, fingerprint = _validation(spec)
    events.emit("phase", name="load")
    device = _device(spec.device)
    started = time.perf_counter()
    artifact = Path(spec.artifact_path)
    model, vocab_size = rebuild(artifact, spec.artifact_sha256, device)
    if vocab_size != table.vocab_size:
        raise ArtifactError(
            f"{artifact}: vocab_size = {vocab_size}, the data's tokenizer has {table.vocab_size} pieces"
        )
    events.emit("phase", name="score")
    result = evaluate(
        model.logits, tokens, table, vocab_size=vocab_size, seq_len=spec.seq_len, batch_seqs=spec.batch_seqs,
        device=device, progress=events.windows,
    )
    seconds = time.perf_counter() - started
    if _sha256(artifact) != spec.artifact_sha256:
        raise ArtifactError(f"{artifact}: the file changed while it was being scored")
    return ScoreResult(
        run_id=spec.run_id, split=spec.split, val_loss=result.val_loss, val_bpb=result.val_bpb,
        tokens=result.tokens, bytes=result.bytes, eval_seconds=seconds, artifact_sha256=spec.artifact_sha256,
        evaluator_hash=evaluator_hash(), data_fingerprint=fingerprint,
    )


def _validation(spec: ScoreSpec) -> tuple[ByteTable, npt.NDArray[np.uint16], str]:
    """Byte table, token stream and data fingerprint. Raises DataError.

    Where the folder has a manifest, tokenizer and scored shards are hashed against it: the fingerprint
    then speaks of the bytes that were scored, not of those that were once written.
    """
    folder = open_folder(Path(spec.data_dir))
    if folder.manifest is not None:
        shards = folder.manifest.splits[spec.split].shards if spec.split in folder.manifest.splits else ()
        known = {s.path: s.sha256 for s in shards}
        known[folder.manifest.tokenizer.path] = folder.manifest.tokenizer.sha256
        for name, sha in known.items():
            if (found := file_sha256(folder.path / name)) != sha:
                raise ManifestError(f"{folder.path / name}: sha256 = {found}, manifest says {sha}")
    tokens = eval_tokens(folder.path, spec.split, spec.max_tokens, spec.seq_len)
    return ByteTable.from_model(folder.tokenizer), tokens, folder.fingerprint


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InfrastructureError(f"device {name}: this process sees {seen} CUDA device(s)")
    return device


def rebuild(artifact: Path, sha256: str | None, device: torch.device) -> tuple[Any, int]:
    """The model that an artifact holds, ready to score, and its vocabulary size.

    The model has ``logits(int64 [B, L]) -> fp32 [B, L, V]``. Names and shapes are compared on a model
    without storage first, so that knobs which ask for more than the artifact holds cost no memory.
    Raises ArtifactError when the file cannot be read, or does not fit the model its knobs describe.
    """
    # The model and the codecs are a candidate's to change: imported late, so that what they do on
    # import is reported as this run's failure.
    from trainer.export.artifact import load_artifact
    from trainer.model.gpt import build_model

    knobs, state = load_artifact(artifact, sha256)
    try:
        _fit(_without_storage(build_model, knobs), state, artifact)
        model = build_model(knobs)
    except ArtifactError:
        raise
    except (ValueError, TypeError) as e:
        raise ArtifactError(f"{artifact}: cannot be rebuilt: {e}") from e
    model.load_state_dict(state)
    return model.requires_grad_(False).eval().to(device), int(knobs["vocab_size"])


def _without_storage(
    build: Callable[[Mapping[str, KnobValue]], nn.Module], knobs: Mapping[str, KnobValue]
) -> nn.Module:
    """The model as names and shapes only."""
    try:
        with torch.device("meta"):
            return build(knobs)
    except RuntimeError as e:
        raise RuntimeError(
            f"the model cannot be built on torch.device('meta'), where its shapes are checked: {e}; "
            "a constructor must not look at values of tensors it makes"
        ) from e


def _fit(model: nn.Module, state: dict[str, torch.Tensor], artifact: Path) -> None:
    """Compare names and shapes of ``state`` with what ``model`` expects; ArtifactError names some faults."""
    want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in state.items()}
    faults = [f"{n} missing" for n in want if n not in have]
    faults += [f"{n} not in the model" for n in have if n not in want]
    faults += [f"{n} is {have[n]}, expected {want[n]}" for n in want if n in have and have[n] != want[n]]
    if faults:
        raise ArtifactError(f"{artifact}: does not fit the model of its knobs: {'; '.join(faults[:5])}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise ArtifactError(f"{path}: {e.strerror or e}; it was there when scoring began") from e
