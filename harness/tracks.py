"""Tracks: measurement protocols, declared in ``tracks.toml``; and the fingerprint under which numbers compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import UserError
from trainer.knobs import REGISTRY, KnobError, KnobValue

TRACKS_FILE = Path(__file__).with_name("tracks.toml")
STAGES = ("breadth", "confirm")
PLANNED_TRACKS = ("gpu-proxy", "h100-1x", "record-8x")


@dataclass(frozen=True, kw_only=True)
class Track:
    """One protocol. Everything here except time-outs and limits enters the fingerprint."""

    name: str
    title: str
    data: str  # a data folder's name under the workspace's data root; "embedded" is built on first use
    device: str  # cpu | cuda
    workers: int  # places where runs execute side by side
    threads: int  # CPU threads of one run
    breadth_steps: int
    confirm_steps: int
    val_tokens: int  # confirm: the first so many tokens of val
    dev_tokens: int  # breadth: the first so many tokens of dev, which is cut from train
    cap_bytes: int  # code + artifact
    run_timeout_s: float
    hang_timeout_s: float  # longest silence of the event stream
    step_time_limit_s: float  # preflight refuses slower candidates
    memory_limit_bytes: int
    compile: bool = False
    deterministic: bool = True
    meaningless: bool = False
    fixed: Mapping[str, KnobValue] = field(default_factory=dict)
    start: Mapping[str, KnobValue] = field(default_factory=dict)

    @property
    def locked(self) -> frozenset[str]:
        """Knobs that no recipe or proposal may change: the track's own, and every other "shape" knob."""
        return frozenset(self.fixed) | {k.name for k in REGISTRY if k.role == "shape"}

    def steps(self, stage: str) -> int:
        """Optimizer steps of a stage's runs."""
        return self.breadth_steps if stage == "breadth" else self.confirm_steps

    def resolve(self, recipe: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, KnobValue]:
        """Defaults < track < recipe < changes; locked knobs in recipe or changes raise UserError."""
        for source, layer in (("the recipe", recipe), ("the change", changes or {})):
            for name in REGISTRY.parse(layer):
                if name in self.locked:
                    raise UserError(f"knob {name} is fixed by track {self.name}: {source} may not set it "
                                    f"(locked here: {', '.join(sorted(self.locked))})")
        try:
            return REGISTRY.resolve(self.fixed, self.start, recipe, changes or {})
        except KnobError as e:
            raise UserError(str(e)) from None

    def protocol(self) -> dict[str, Any]:
        """The fields that make two numbers comparable."""
        skip = {"title", "workers", "run_timeout_s", "hang_timeout_s", "step_time_limit_s", "memory_limit_bytes"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in skip}


@cache
def load_tracks() -> dict[str, Track]:
    """Every declared track. Raises UserError naming the field that is wrong."""
    raw = tomllib.loads(TRACKS_FILE.read_text(encoding="utf-8"))
    tracks = {}
    for name, body in raw.items():
        try:
            track = Track(name=name, **body)
        except TypeError as e:
            raise UserError(f"{TRACKS_FILE.name} [{name}]: {e}") from None
        track.resolve({})
        tracks[name] = track
    return tracks


def get_track(name: str) -> Track:
    """The track called ``name``, or UserError with the valid names."""
    tracks = load_tracks()
    if name not in tracks and name in PLANNED_TRACKS:
        raise UserError(f"--track {name}: planned, not in this version (see README.md, \"What is not there yet\"); "
                        f"valid: {', '.join(tracks)}")
    if name not in tracks:
        raise UserError(f"--track {name}: no such track; valid: {', '.join(tracks)}")
    return tracks[name]


def environment(track: Track) -> dict[str, str]:
    """What of this machine changes bits: recorded, and part of the fingerprint."""
    from importlib.metadata import version

    return {
        "cpu": _cpu_model(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "zstandard": version("zstandard"),
        "threads": str(track.threads),
        "device": track.device,
        "gpu": _gpu_model() if track.device == "cuda" else "",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    keep = {}
    for line in lines:
        key, _, value = line.partition(":")
        # Vector extensions choose the kernels, and kernels choose the bits; the clock does not.
        if key.strip() in ("model name", "cpu family", "model", "stepping"):
            keep.setdefault(key.strip(), value.strip())
        if key.strip() in ("flags", "Features") and "flags" not in keep:
            keep["flags"] = hashlib.sha256(" ".join(sorted(value.split())).encode()).hexdigest()[:12]
    return ", ".join(f"{k} {v}" for k, v in sorted(keep.items())) or "unknown"


def _gpu_model() -> str:
    for folder in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in folder.read_text(encoding="utf-8").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unknown")


def fingerprint(track: Track, data_fingerprint: str, evaluator_hash: str) -> tuple[str, dict[str, str]]:
    """(hash, parts): numbers are compared only under one hash; the parts say what differs."""
    parts = {
        "track": _hash(track.protocol()),
        "data": data_fingerprint,
        "evaluator": evaluator_hash,
        "defaults": _hash(REGISTRY.resolve(track.fixed, track.start)),
        "environment": _hash(environment(track)),
    }
    return _hash(parts), parts


def _hash(obj: Any) -> str:
    return hashlib.sha256(json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_seed(search_seed: int, purpose: str, generation: int, k: int) -> int:
    """Seed of the k-th run of a list shared by both sides of a pair: hash(search, purpose, generation, k).

    ``generation`` counts the keeps so far: a new incumbent is measured on seeds that its own
    selection never used.
    """
    text = f"{search_seed}:{purpose}:{generation}:{k}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
