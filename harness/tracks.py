"""Tracks: measurement protocols, declared in ``tracks.toml``; and the fingerprint under which numbers compare."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from ledger.measured import TrackDerived
from trainer.knobs import REGISTRY, KnobError, KnobValue

if TYPE_CHECKING:
    from ledger.store import Ledger

TRACKS_FILE = Path(__file__).with_name("tracks.toml")
STAGES = ("breadth", "confirm")
NOT_PROTOCOL = frozenset({
    "title", "base", "why", "workers", "gpus", "run_timeout_s", "hang_timeout_s", "step_time_limit_s",
    "memory_limit_bytes", "timing_steps", "converged_ratio", "converged_cap_bytes", "worker_price_per_hour",
})
"""Fields that change no measured number: names, limits, prices, predictions. All others are the protocol."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """One protocol. Everything but the fields of NOT_PROTOCOL enters the fingerprint."""

    name: str
    title: str
    data: str  # a data folder's name under the workspace's data root; "embedded" is built on first use
    device: str  # cpu | cuda
    workers: int  # places where runs execute side by side
    threads: int  # CPU threads of one run
    breadth_steps: int
    confirm_steps: int
    timing_steps: int  # optimizer steps of a preflight or timing run
    val_tokens: int  # confirm: the first so many tokens of val; 0 = all
    dev_tokens: int  # breadth: the first so many tokens of dev, which is cut from train; 0 = all
    cap_bytes: int  # code + artifact
    run_timeout_s: float
    hang_timeout_s: float  # longest silence of the event stream
    step_time_limit_s: float  # preflight refuses slower candidates
    memory_limit_bytes: int
    gpus: int = 1  # GPUs of one run; without meaning on a CPU
    compile: bool = False
    deterministic: bool = True
    meaningless: bool = False
    converged_ratio: float = 0.0  # artifact bytes per payload byte of the same model trained for long; 0 = unknown
    converged_cap_bytes: int = 0  # cap on code + converged_ratio * payload; 0 = not checked
    worker_price_per_hour: float = 0.0  # dollars
    base: str = ""  # of a derived track: the one that it was grown from
    why: str = ""  # of a derived track: what it is for
    fixed: Mapping[str, KnobValue] = field(default_factory=dict)
    start: Mapping[str, KnobValue] = field(default_factory=dict)

    @property
    def locked(self) -> frozenset[str]:
        """Knobs that no recipe or proposal may change: the track's own, and every other "shape" knob."""
        return frozenset(self.fixed) | {k.name for k in REGISTRY if k.role == "shape"}

    @property
    def protocol_hash(self) -> str:
        """SHA-256 of :meth:`protocol`: the fingerprint's part "track"."""
        return _hash(self.protocol())

    @property
    def policy_track(self) -> str:
        """Section of gate.toml that judges here: the track's own, else (a derived track) its base's."""
        from harness.gate.policy import tracks as sections

        own = not self.base or self.name in sections()
        return self.name if own else declared_track(self.base).policy_track

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
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in NOT_PROTOCOL}


_WHOLE = {
    "workers": 1, "threads": 1, "breadth_steps": 1, "confirm_steps": 1, "timing_steps": 1, "val_tokens": 0,
    "dev_tokens": 0, "cap_bytes": 1, "memory_limit_bytes": 1, "gpus": 1, "converged_cap_bytes": 0,
}
"""Whole-number fields and their least value."""
_REAL = {
    "run_timeout_s": False, "hang_timeout_s": False, "step_time_limit_s": False, "converged_ratio": True,
    "worker_price_per_hour": True,
}
"""Number fields and whether 0 is valid."""


@cache
def load_tracks() -> dict[str, Track]:
    """Every declared track. Raises UserError naming the field that is wrong."""
    raw = tomllib.loads(TRACKS_FILE.read_text(encoding="utf-8"))
    return {name: read_track(name, raw) for name in raw}


def read_track(name: str, raw: Mapping[str, Mapping[str, Any]]) -> Track:
    """The track ``name`` of a parsed tracks file, what it inherits filled in. Raises UserError."""
    where = f"{TRACKS_FILE.name} [{name}]"
    try:
        track = Track(name=name, **_inherit(name, raw, ()))
    except TypeError as e:
        raise UserError(f"{where}: {e}") from None
    for key, least in _WHOLE.items():
        value = getattr(track, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{where}: {key} = {value!r}; valid: a whole number from {least} up")
    for key, zero in _REAL.items():
        value = getattr(track, key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not zero):
            raise UserError(f"{where}: {key} = {value!r}; valid: a number {'from 0 up' if zero else 'above 0'}")
    if track.device not in ("cpu", "cuda"):
        raise UserError(f"{where}: device = {track.device!r}; valid: cpu, cuda")
    if bool(track.converged_ratio) != bool(track.converged_cap_bytes):
        raise UserError(f"{where}: converged_ratio and converged_cap_bytes are checked together: set both or neither")
    track.resolve({})
    return track


def _inherit(name: str, raw: Mapping[str, Mapping[str, Any]], below: tuple[str, ...]) -> dict[str, Any]:
    """A track's table over its base's, tables of knobs merged knob by knob."""
    own = dict(raw[name])
    base = own.get("base", "")
    if not base:
        return own
    where = f"{TRACKS_FILE.name} [{name}]"
    if base not in raw or base in (name, *below):
        raise UserError(f"{where}: base = {base!r}; valid: another track of this file that is not derived from {name}")
    if not own.get("why") or not own.get("title"):
        raise UserError(f"{where}: a derived track says its own title, and why it is there")
    inherited = _inherit(base, raw, (name, *below))
    knobs = {part: {**inherited.get(part, {}), **own.get(part, {})} for part in ("fixed", "start")}
    return {**inherited, **own, **knobs}


def declared_track(name: str, option: str = "--track") -> Track:
    """The track called ``name``, whether or not it can run here, or UserError with the valid names."""
    tracks = load_tracks()
    if name not in tracks:
        raise UserError(f"{option} {name}: no such track; valid: {', '.join(tracks)}")
    return tracks[name]


def get_track(name: str, option: str = "--track") -> Track:
    """The track called ``name``, to be run on this machine. UserError when there is none, or it cannot run here."""
    track = declared_track(name, option)
    problem = device_problem(track)
    if problem:
        raise UserError(f"{option} {name}: {problem}")
    return track


DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia")


def device_problem(track: Track) -> str:
    """What of its device this machine lacks, in words, and how to get it; "" when the track can run.

    Looks at files only: importing torch to ask would cost every command two seconds.
    """
    if track.device != "cuda":
        return ""
    if track.gpus > 1:
        return (f"needs {track.gpus} GPUs in one run (torchrun), and multi-GPU runs are not built yet; one GPU: "
                + ", ".join(t.name for t in load_tracks().values() if t.device == "cuda" and t.gpus == 1))
    need = "needs a CUDA GPU, and none is usable here: "
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not [*DEVICES.glob("nvidia[0-9]*"), *DEVICES.glob("dxg")]:  # dxg: the Windows subsystem's
        if DRIVER.is_dir():
            return need + (f"the NVIDIA driver is loaded, but there is no {DEVICES}/nvidia0; start the container with "
                           "its GPUs (docker run --gpus all)")
        return need + (f"there is no {DEVICES}/nvidia0 and no NVIDIA driver ({DRIVER}); search on a machine that has "
                       "one, or on a CPU track: "
                       + ", ".join(t.name for t in load_tracks().values() if t.device == "cpu" and not t.meaningless))
    if hidden is not None and (not hidden.strip() or hidden.strip().startswith("-")):
        return need + f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU; unset it"
    if _torch_is_cpu_only():
        return need + "the installed torch is a CPU build; install a CUDA build (README.md, \"CPU or CUDA torch\")"
    return ""


def _torch_is_cpu_only() -> bool:
    """Whether torch's own version file says that it was built without CUDA (False where it does not say)."""
    spec = importlib.util.find_spec("torch")
    try:
        text = Path(str(spec.origin)).with_name("version.py").read_text(encoding="utf-8") if spec else ""
    except OSError:
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*None\s*$", text, re.MULTILINE) is not None


def data_problem(track: Track, root: Path) -> str:
    """What is missing of the track's data under the data root, and how to get it; "" when it is there or is built."""
    from harness.data import EMBEDDED

    folder = root / track.data
    if track.data == EMBEDDED or folder.is_dir():
        return ""
    return (f"needs the data folder {folder}, which does not exist. From the published documents (Hugging Face data "
            "set willdepueoai/parameter-golf: datasets/docs_selected.jsonl, whose first 1,050,000 lines are enough, "
            f"and datasets/tokenizers/fineweb_{track.fixed['vocab_size']}_bpe.model): `autoresearch data build --from "
            f"docs_selected.jsonl --tokenizer fineweb_{track.fixed['vocab_size']}_bpe.model --val-docs 50000 "
            f"--out {folder}`")


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
        **({"world_size": str(track.gpus)} if track.gpus > 1 else {}),
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
        "track": track.protocol_hash,
        "data": data_fingerprint,
        "evaluator": evaluator_hash,
        "defaults": _hash(REGISTRY.resolve(track.fixed, track.start)),
        "environment": _hash(environment(track)),
    }
    return _hash(parts), parts


PARTS = {
    "track": "the track's protocol",
    "data": "data",
    "evaluator": "scoring code",
    "defaults": "plain baseline (the knobs' defaults and the track's settings)",
    "environment": "machine and software",
}
"""The fingerprint's parts, in words."""


def differences(
    a: Mapping[str, str], b: Mapping[str, str],
    environments: tuple[Mapping[str, str], Mapping[str, str]] | None = None, derived: Iterable[TrackDerived] = (),
) -> list[str]:
    """What differs between two fingerprints, given by their parts, one line each; [] exactly when they are equal.

    Parts are hashes. ``environments`` (as :func:`environment` gave them, a's and b's) and the ledger's ``derived``
    tracks say what lies behind them, as far as it was recorded; declared tracks are known by their hash.
    """
    out: list[str] = []
    for name in sorted({*a, *b}, key=lambda n: [*PARTS, n].index(n)):
        x, y = a.get(name, ""), b.get(name, "")
        if x == y:
            continue
        details = _protocol_changes(x, y, derived) if name == "track" else []
        if name == "environment" and environments:
            details = _environment_changes(*environments)
        out += details or [f"{PARTS.get(name, name)}: {_short(x)} -> {_short(y)}"]
    return out


def require_same(
    a: Mapping[str, str], b: Mapping[str, str], what: str,
    environments: tuple[Mapping[str, str], Mapping[str, str]] | None = None, derived: Iterable[TrackDerived] = (),
) -> None:
    """Refuse to compare ``what`` across fingerprints: UserError with every difference. Arguments as differences()."""
    found = differences(a, b, environments, derived)
    if found:
        raise UserError(f"{what}: figures are compared only under one fingerprint, and these differ: "
                        + "; ".join(found))


def _short(value: str) -> str:
    return (value[:8] + ".." if len(value) > 12 else value) or "not recorded"


def _environment_changes(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    out: list[str] = []
    for key in sorted(k for k in {*a, *b} if a.get(k, "") != b.get(k, "")):
        x, y = a.get(key, ""), b.get(key, "")
        if key == "cpu":  # a list of facts: only those that differ
            left, right = x.split(", "), y.split(", ")
            x, y = (", ".join(v for v in mine if v not in other) for mine, other in ((left, right), (right, left)))
        out.append(f"{key} {x or 'none'} -> {y or 'none'}")
    return out


def _protocol_changes(x: str, y: str, derived: Iterable[TrackDerived]) -> list[str]:
    known = {t.protocol_hash: t for t in load_tracks().values()}
    if x in known and y in known:
        changed = protocol_changes(known[x], known[y])
        return [f"track {known[x].name} -> {known[y].name}", *(f"{k} {v}" for k, v in changed.items())]
    names = {d.protocol: f"{d.track} as once derived from {d.base} by "
                         + ", ".join(f"{k} {v}" for k, v in d.changes.items()) for d in derived}
    names |= {h: f"{t.name} as declared today" for h, t in known.items()}
    if x not in names and y not in names:
        return []
    return [f"{PARTS['track']}: {names.get(x, _short(x))} -> {names.get(y, _short(y))}"]


def protocol_changes(old: Track, new: Track) -> dict[str, str]:
    """Protocol fields (knobs as fixed.NAME, start.NAME) that differ, each as "old -> new"; the name aside."""
    def flat(track: Track) -> dict[str, Any]:
        fields = track.protocol()
        knobs = {f"{part}.{k}": v for part in ("fixed", "start") for k, v in fields.pop(part).items()}
        return fields | knobs

    a, b = flat(old), flat(new)
    return {k: f"{a.get(k, 'unset')} -> {b.get(k, 'unset')}"
            for k in dict.fromkeys([*a, *b]) if k != "name" and a.get(k, "unset") != b.get(k, "unset")}


def record_derivation(ledger: Ledger, track: Track) -> None:
    """Write ``track.derived`` (the base's first) for a derived track, once for each protocol of it."""
    if not track.base:
        return
    base = declared_track(track.base)
    record_derivation(ledger, base)
    known = [r.body for r in ledger.records(types=["track.derived"]) if isinstance(r.body, TrackDerived)]
    if not any((d.track, d.protocol) == (track.name, track.protocol_hash) for d in known):
        ledger.append("track.derived", TrackDerived(
            track=track.name, base=base.name, changes=protocol_changes(base, track),
            base_protocol=base.protocol_hash, protocol=track.protocol_hash, why=track.why))


def _hash(obj: Any) -> str:
    return hashlib.sha256(json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_seed(search_seed: int, purpose: str, generation: int, k: int) -> int:
    """Seed of the k-th run of a list shared by both sides of a pair: hash(search, purpose, generation, k).

    ``generation`` counts the keeps so far: a new incumbent is measured on seeds that its own
    selection never used.
    """
    text = f"{search_seed}:{purpose}:{generation}:{k}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
