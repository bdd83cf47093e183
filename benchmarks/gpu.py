"""How fast the trainer is on this GPU: ``python -m benchmarks.gpu`` from the repository root.

Every configuration is one real run, ``python -m trainer train``, in a process of its own: what is timed is
what a search pays for. Measured per configuration:

step_ms           median step time, milliseconds (windows of 5 steps, read after a device sync)
tokens_per_s      batch tokens / step time
mfu               model FLOP/s over the chip's dense bf16 peak, matrix products only: 6 FLOP per token and
                  weight that is multiplied (block matrices and head; the embedding look-up is free)
mfu_attention     the same plus causal attention, 6 * layers * width * context FLOP per token: QK^T and AV
                  cost 2 * 2 * width * context/2 forward, twice that backward
peak_memory       the allocator's peak, bytes (CPU: largest resident set)
before_step_1_s   process start to first timed step: imports, data, compilation, warm-up

``--official PATH`` also runs the challenge's train_gpt.py (unchanged, same data folder, shape, steps and
micro-batches) in the same session and prints the pair, with the score of ours by the referee.

Results go to ``benchmarks/results/gpu_<device>.json`` as they come; a configuration that is there already
is skipped (``--fresh``: measured again), so calls with ``--seconds`` add up.
Exit codes: 0 measured, 2 no CUDA device or a bad argument, 3 some configuration failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import official
from trainer.contract import (
    RESULT_FILE,
    SCORE_FILE,
    SCORE_SPEC_FILE,
    SPEC_FILE,
    Failure,
    RunResult,
    RunSpec,
    ScoreResult,
    ScoreSpec,
    dump,
    load_outcome,
)
from trainer.data.shards import write_shard
from trainer.knobs import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
PEAK_TFLOPS = {
    "H200": 989.0, "H100 80GB HBM3": 989.0, "H100 SXM": 989.0, "H100 PCIe": 756.0, "GH200": 989.0,
    "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.2,
}
"""Dense bf16 peak with fp32 accumulation, from NVIDIA's data sheets; matched against the device's name."""
LOG_EVERY = 5
SEED = 1337


@dataclass(frozen=True)
class Config:
    """One thing to measure. ``knobs``: what differs from the plain defaults."""

    name: str
    steps: int
    compile: bool
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """Every knob."""
        return REGISTRY.resolve({"iterations": self.steps}, self.knobs)


def gpu_configs() -> list[Config]:
    """The challenge's shape by micro-batch, and a proxy's batch, each compiled and eager."""
    found = []
    for compiled in (True, False):
        mode = "compile" if compiled else "eager"
        for micro in (65536, 131072, 262144, 0):
            label = f"micro{micro // 1024}k" if micro else "whole"
            found.append(Config(f"9x512-524k-{label}-{mode}", 30, compiled, {"micro_batch_tokens": micro}))
        found.append(Config(f"9x512-66k-whole-{mode}", 60, compiled, {"train_batch_tokens": 65536}))
    return found


def tiny_configs() -> list[Config]:
    """Seconds on a CPU: shows that the measuring works, measures nothing worth keeping."""
    small = {
        "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 1024,
        "train_seq_len": 32, "train_batch_tokens": 128,
    }
    return [Config("tiny-whole-eager", 12, False, small),
            Config("tiny-micro-eager", 12, False, small | {"micro_batch_tokens": 64})]


def paired_config(tiny: bool) -> Config:
    """What is run next to the challenge's script: its 8 micro-batches, container and compressor."""
    theirs = {"container": "challenge", "compressor": "zlib"}
    if tiny:
        return Config("paired", 12, False, {**tiny_configs()[0].knobs, **theirs})
    return Config("paired", 200, True, {"micro_batch_tokens": 65536, **theirs})


def flops_per_token(k: Mapping[str, Any]) -> tuple[float, float]:
    """Training FLOP per token (forward + backward): matrix products alone, and with causal attention."""
    d, layers = int(k["model_dim"]), int(k["num_layers"])
    kv = d // int(k["num_heads"]) * int(k["num_kv_heads"])
    block = 2 * d * d + 2 * d * kv + 2 * d * d * int(k["mlp_mult"])
    matrices = 6.0 * (layers * block + d * int(k["vocab_size"]))
    return matrices, matrices + 6.0 * layers * d * int(k["train_seq_len"])


def peak_flops(device_name: str, given_tflops: float | None) -> float | None:
    """The chip's peak, FLOP/s, or None when it is not in the table."""
    if given_tflops:
        return given_tflops * 1e12
    return next((1e12 * t for name, t in PEAK_TFLOPS.items() if name in device_name), None)


def random_data(folder: Path, vocab: int, tokens: int) -> Path:
    """A train shard of random tokens: speed does not depend on what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(2, vocab, tokens).astype(np.uint16)
    write_shard(folder / "fineweb_train_000000.bin", ids)
    return folder


@dataclass(frozen=True)
class Session:
    """What all measurements of one call share. ``until``: on the monotonic clock, seconds."""

    device: str
    data: Path
    work: Path
    until: float
    peak_tflops: float | None = None

    @property
    def left(self) -> float:
        """Seconds that remain, at least one."""
        return max(self.until - time.monotonic(), 1.0)

    def child(self, command: str, spec: Path) -> str | None:
        """Run ``python -m trainer COMMAND SPEC``, output to log.txt beside it. Returns what went wrong, if anything
        but a Failure on file did."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        log = spec.parent / "log.txt"
        with log.open("a", encoding="utf-8") as out:
            try:
                done = subprocess.run(
                    [sys.executable, "-P", "-m", "trainer", command, str(spec)], cwd=spec.parent, env=env,
                    stdout=out, stderr=subprocess.STDOUT, timeout=self.left,
                )
            except subprocess.TimeoutExpired:
                return "out of --seconds"
        return None if done.returncode in (0, 3) else log.read_text(encoding="utf-8")[-500:] or "no output"

    def measure(self, config: Config) -> dict[str, Any]:
        """Run one configuration and derive its figures; ``status`` says whether it went through."""
        folder = self.work / config.name
        folder.mkdir(parents=True)
        knobs = config.resolved()
        spec = RunSpec(
            run_id=config.name, seed=SEED, knobs=knobs, data_dir=str(self.data), out_dir=str(folder),
            device=self.device, deterministic=False, compile=config.compile, log_every=LOG_EVERY,
        )
        dump(spec, folder / SPEC_FILE)
        out: dict[str, Any] = {"config": asdict(config)}
        if error := self.child("train", folder / SPEC_FILE):
            return out | {"status": "crash", "error": error}
        result = load_outcome(RunResult, folder / RESULT_FILE)
        if isinstance(result, Failure):
            return out | {"status": result.failure, "error": result.error}
        rate = int(knobs["train_batch_tokens"]) / (result.step_ms / 1e3)
        matrices, whole = flops_per_token(knobs)
        peak = peak_flops(result.device_name, self.peak_tflops)
        return out | {
            "status": "ok", "device": result.device_name, "torch": result.torch_version, "params": result.params,
            "step_ms": result.step_ms, "tokens_per_s": rate,
            "mfu": matrices * rate / peak if peak else None, "mfu_attention": whole * rate / peak if peak else None,
            "peak_memory_bytes": result.peak_memory_bytes, "before_step_1_s": result.setup_seconds,
            "train_seconds": result.train_seconds, "export_seconds": result.export_seconds,
            "final_train_loss": result.final_train_loss, "artifact_bytes": result.artifact_bytes,
            "artifact_sha256": result.artifact_sha256, "artifact_path": result.artifact_path,
        }

    def score(self, config: Config, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Let the referee score a measured run's artifact on the whole validation split."""
        folder = self.work / config.name
        spec = ScoreSpec(
            run_id=config.name, artifact_path=figures["artifact_path"], artifact_sha256=figures["artifact_sha256"],
            data_dir=str(self.data), out_dir=str(folder), seq_len=int(config.resolved()["train_seq_len"]),
            device=self.device,
        )
        dump(spec, folder / SCORE_SPEC_FILE)
        if error := self.child("score", folder / SCORE_SPEC_FILE):
            return {"status": "crash", "error": error}
        result = load_outcome(ScoreResult, folder / SCORE_FILE)
        if isinstance(result, Failure):
            return {"status": result.failure, "error": f"score: {result.error}"}
        return {"val_loss": result.val_loss, "val_bpb": result.val_bpb}


class Store:
    """The results file: read at start, written whole after every measurement."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"configs": {}}
        if path.exists() and not fresh:
            self.data = json.loads(path.read_text(encoding="utf-8"))

    def add(self, name: str, figures: Mapping[str, Any]) -> None:
        """Keep one measurement, with when and at which commit it was made."""
        stamp = {"measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit()}
        self.data["configs"][name] = {k: v for k, v in figures.items() if k != "artifact_path"} | stamp
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.data, indent=1, sort_keys=True, allow_nan=False) + "\n"
        tmp = self.path.with_name(self.path.name + ".tmp")
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(self.path)

    def has(self, name: str) -> bool:
        """Whether ``name`` went through before (a failure is tried again)."""
        return self.data["configs"].get(name, {}).get("status") == "ok"


def commit() -> str:
    """The checkout's commit, with a mark if files differ from it; "unknown" outside git."""
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text, one line a configuration."""
    head = (f"{'configuration':<30} {'step ms':>9} {'tokens/s':>11} {'MFU':>6} {'+attn':>6} {'peak MiB':>9} "
            f"{'before step 1':>13}  status")
    lines = [head, "-" * len(head)]
    for name, f in configs.items():
        if f.get("status") != "ok":
            lines.append(f"{name:<30} {'':>59}  {f.get('status')}: {str(f.get('error', ''))[:60]}")
            continue
        share = [f"{f[k]:6.1%}" if f.get(k) is not None else f"{'-':>6}" for k in ("mfu", "mfu_attention")]
        before = f"{f['before_step_1_s']:11.1f} s" if "before_step_1_s" in f else f"{'-':>13}"
        rate = f"{f['tokens_per_s']:11,.0f}" if "tokens_per_s" in f else f"{'-':>11}"
        lines.append(f"{name:<30} {f['step_ms']:9.2f} {rate} {share[0]} {share[1]} "
                     f"{f.get('peak_memory_bytes', 0) / 2**20:9,.0f} {before}  ok")
    return "\n".join(lines)


def paired_table(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Ours beside the challenge's script, line by line."""
    rows = [("step ms", "step_ms", "{:.2f}"), ("val_bpb after export", "val_bpb", "{:.4f}"),
            ("weights, bytes", "artifact_bytes", "{:,}"), ("parameters", "params", "{:,}"),
            ("peak memory, bytes", "peak_memory_bytes", "{:,}")]
    lines = [f"{'':<22} {'autoresearch':>16} {'train_gpt.py':>16}"]
    for label, key, form in rows:
        cells = [form.format(f[key]) if f.get(key) is not None else "-" for f in (ours, theirs)]
        lines.append(f"{label:<22} {cells[0]:>16} {cells[1]:>16}")
    return "\n".join(lines)


def device_name(device: str) -> str | None:
    """The device's name, asked of torch in another process; None without CUDA."""
    if device == "cpu":
        return "cpu"
    code = f"import torch; print(torch.cuda.get_device_name({device!r}) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__).partition("\n")[0])
    p.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu (with --tiny)")
    p.add_argument("--tiny", action="store_true", help="self-check in seconds; its figures mean nothing")
    p.add_argument("--only", default="", help="regular expression on configuration names")
    p.add_argument("--seconds", type=float, default=3600.0, help="start nothing more after this long")
    p.add_argument("--fresh", action="store_true", help="measure again what the results file holds")
    p.add_argument("--data", type=Path, help="data folder (default: random tokens); needed by --official")
    p.add_argument("--official", type=Path, metavar="PATH", help="the challenge's train_gpt.py, for a pair")
    p.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a chip that is not in the table")
    p.add_argument("--out", type=Path, help="results file (default: benchmarks/results/gpu_<device>.json)")
    return p.parse_args(argv)


def pair(session: Session, store: Store, script: Path, tiny: bool) -> int:
    """Measure ours and the official script once each; returns how many failed."""
    config = paired_config(tiny)
    ours = session.measure(config)
    if ours["status"] == "ok":
        ours |= session.score(config, ours)
    store.add("paired", ours)
    theirs = official.run(
        script.resolve(), config.resolved(), session.data, session.work / "official", SEED, session.left
    )
    store.add("official", theirs)
    print(paired_table(ours, theirs))
    for name, figures in (("autoresearch", ours), ("train_gpt.py", theirs)):
        if figures["status"] != "ok":
            print(f"{name}: {figures['status']}: {figures['error']}", file=sys.stderr)
    return sum(f["status"] != "ok" for f in (ours, theirs))


def measure_all(configs: Sequence[Config], session: Session, store: Store) -> int:
    """Measure what the store lacks while time lasts; returns how many failed."""
    failed = left = 0
    for config in configs:
        if store.has(config.name):
            print(f"{config.name}: in {store.path.name} already (--fresh measures it again)")
        elif time.monotonic() >= session.until:
            left += 1
        else:
            print(f"{config.name} ...", flush=True)
            figures = session.measure(config)
            store.add(config.name, figures)
            failed += figures["status"] != "ok"
    if left:
        print(f"{left} configuration(s) not started: out of --seconds; call again to go on")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for; see the module's text for the exit codes."""
    args = arguments(argv)
    name = device_name(args.device)
    if name is None or (args.device == "cpu" and not args.tiny):
        what = "no CUDA device is visible to torch" if name is None else "--device cpu is for the self-check only"
        print(f"gpu benchmark: {what}; without one, check the benchmark itself with: "
              "python -m benchmarks.gpu --device cpu --tiny", file=sys.stderr)
        return 2
    if args.official and not (args.data and args.official.is_file()):
        print("gpu benchmark: --official PATH needs the script itself and --data FOLDER with shards and "
              "tokenizer in the challenge's layout", file=sys.stderr)
        return 2
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ("_tiny" if args.tiny else "")
    store = Store(args.out or ROOT / "benchmarks" / "results" / f"gpu_{slug}.json", args.fresh)
    configs = [c for c in (tiny_configs() if args.tiny else gpu_configs()) if re.search(args.only, c.name)]
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as tmp:
        work, until = Path(tmp), time.monotonic() + args.seconds
        data = (args.data.resolve() if args.data
                else random_data(work / "data", 1024, 30_000 if args.tiny else 20_000_000))
        session = Session(args.device, data, work, until, args.peak_tflops)
        failed = measure_all(configs, session, store)
        if args.official:
            failed += pair(session, store, args.official, args.tiny)
    print(table({n: f for n, f in store.data["configs"].items() if n not in ("paired", "official")}))
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
