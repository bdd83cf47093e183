"""Run the challenge's own ``train_gpt.py``, unchanged, and read its figures from its log lines."""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data.layout import open_folder

_STEP = re.compile(r"^step:(\d+)/(\d+) train_loss:(\S+) train_time:(\d+)ms step_avg:(\S+)ms$", re.M)
_VAL = re.compile(r"^step:\d+/\d+ val_loss:(\S+) val_bpb:(\S+) train_time", re.M)
_EXACT = re.compile(r"^final_int8_zlib_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)$", re.M)
_BYTES = re.compile(r"^Serialized model int8\+zlib: (\d+) bytes", re.M)
_CODE = re.compile(r"^Code size: (\d+) bytes", re.M)
_PEAK = re.compile(r"^peak memory allocated: (\d+) MiB", re.M)
_PARAMS = re.compile(r"^model_params:(\d+)$", re.M)

SHARED_KNOBS = (
    "iterations", "train_batch_tokens", "train_seq_len", "vocab_size", "num_layers", "model_dim", "num_heads",
    "num_kv_heads", "mlp_mult", "tied_embed_lr", "matrix_lr", "scalar_lr", "muon_momentum", "beta1", "beta2",
    "grad_clip_norm", "logit_softcap", "qk_gain_init", "rope_base",
)
"""Knobs that the script reads from the environment under the same name in capitals."""


def environment(knobs: Mapping[str, Any], data_dir: Path, run_id: str, seed: int) -> dict[str, str]:
    """The script's environment for the same run: fixed steps, our fractions as its step counts."""
    steps = int(knobs["iterations"])
    env = {name.upper(): str(knobs[name]) for name in SHARED_KNOBS}
    return env | {
        "DATA_PATH": str(data_dir), "TOKENIZER_PATH": str(open_folder(data_dir).tokenizer), "RUN_ID": run_id,
        "SEED": str(seed), "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "TRAIN_LOG_EVERY": "5",
        "WARMDOWN_ITERS": str(round(knobs["warmdown_frac"] * steps)),
        "MUON_MOMENTUM_WARMUP_STEPS": str(round(knobs["muon_momentum_warmup_frac"] * steps)),
    }


def parse(log: str) -> dict[str, Any]:
    """Figures in a log; those that it does not state are absent.

    ``step_ms``: median over the longest intervals between logged steps, the first step left out.
    """
    out: dict[str, Any] = {}
    steps = [(int(m[1]), int(m[4])) for m in _STEP.finditer(log)]
    late = [s for s in steps if s[0] >= 2]
    gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(late)]
    if gaps:
        # Times are logged in whole milliseconds: only the longest intervals count.
        widest = max(count for count, _ in gaps)
        out["step_ms"] = statistics.median(ms / count for count, ms in gaps if count == widest)
    if losses := [float(m[3]) for m in _STEP.finditer(log)]:
        out["last_train_loss"] = losses[-1]
    for name, pattern, kind in (
        ("artifact_bytes", _BYTES, int), ("code_bytes", _CODE, int), ("params", _PARAMS, int),
    ):
        if m := pattern.search(log):
            out[name] = kind(m[1])
    if m := _PEAK.search(log):
        out["peak_memory_bytes"] = int(m[1]) * 2**20
    if found := _VAL.findall(log):
        out["val_bpb_before_export"] = float(found[-1][1])
    if m := _EXACT.search(log):
        out["val_loss"], out["val_bpb"] = float(m[1]), float(m[2])
    return out


def run(
    script: Path, knobs: Mapping[str, Any], data_dir: Path, folder: Path, seed: int, limit_s: float
) -> dict[str, Any]:
    """Run ``script`` in ``folder`` and return its figures, with ``status`` ok, failed or timeout."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **environment(knobs, data_dir, "paired", seed)}
    began = time.perf_counter()
    with (folder / "stdout.txt").open("w", encoding="utf-8") as out:
        try:
            code = subprocess.run(
                [sys.executable, str(script)], cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT,
                timeout=limit_s,
            ).returncode
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
    text = (folder / "stdout.txt").read_text(encoding="utf-8", errors="replace")
    figures = parse(text)
    figures |= {"status": status, "wall_seconds": time.perf_counter() - began}
    if status != "ok":
        figures["error"] = text.strip().splitlines()[-1][:500] if text.strip() else "no output"
    return figures
