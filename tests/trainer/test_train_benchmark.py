"""The GPU benchmark's own workings, on the CPU: figures, resuming, the pair with the challenge's script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm

from benchmarks import gpu, official
from trainer.data.shards import write_shard
from trainer.knobs import REGISTRY

ROOT = Path(__file__).resolve().parents[2]

# Log lines in the form that the challenge's script prints, values made up.
LOG = """logs/paired.txt
model_params:17059912
warmup_step:20/20
step:1/20 train_loss:6.9000 train_time:900ms step_avg:900.00ms
step:2/20 train_loss:6.8000 train_time:1000ms step_avg:500.00ms
step:9/20 train_loss:6.1000 train_time:1703ms step_avg:189.22ms
step:10/20 train_loss:6.0000 train_time:1800ms step_avg:180.00ms
step:15/20 train_loss:5.5000 train_time:2400ms step_avg:160.00ms
step:20/20 train_loss:5.0000 train_time:3100ms step_avg:155.00ms
step:20/20 val_loss:5.1000 val_bpb:3.0200 train_time:3101ms step_avg:155.05ms
peak memory allocated: 10184 MiB reserved: 10588 MiB
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 4891234 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 4938876 bytes
final_int8_zlib_roundtrip val_loss:5.1100 val_bpb:3.0300 eval_time:1234ms
final_int8_zlib_roundtrip_exact val_loss:5.11223344 val_bpb:3.03112233
"""


def test_log_lines_are_read() -> None:
    assert official.parse(LOG) == {
        "step_ms": pytest.approx(703 / 7), "last_train_loss": 5.0, "artifact_bytes": 4891234, "code_bytes": 47642,
        "params": 17059912, "peak_memory_bytes": 10184 * 2**20, "val_bpb_before_export": 3.02,
        "val_loss": 5.11223344, "val_bpb": 3.03112233,
    }
    assert official.parse("Traceback\nRuntimeError: CUDA is required\n") == {}


def test_flops_of_the_default_model() -> None:
    """Against a count matrix by matrix, and all parameters that are multiplied."""
    k = REGISTRY.defaults()
    matrices, whole = gpu.flops_per_token(k)
    per_block = 512 * 512 + 2 * 512 * 256 + 512 * 512 + 2 * 512 * 1024
    assert matrices == 6 * (9 * per_block + 512 * 1024)
    scales = 9 * (2 * 512 + 2 * 512 + 8) + 4 * 512
    assert matrices == 6 * (17_059_912 - scales)
    scores = sum(2 * 2 * 512 * (t + 1) for t in range(1024)) / 1024  # QK^T and AV over what each token sees
    assert whole - matrices == pytest.approx(3 * 9 * scores, rel=1e-3)


def test_peaks() -> None:
    assert gpu.peak_flops("NVIDIA H200", None) == 989e12
    assert gpu.peak_flops("NVIDIA H100 80GB HBM3", None) == 989e12
    assert gpu.peak_flops("Some Chip", None) is None
    assert gpu.peak_flops("Some Chip", 100.0) == 1e14


def test_every_configuration_resolves_and_is_named_once() -> None:
    for configs in (gpu.gpu_configs(), gpu.tiny_configs()):
        names = [c.name for c in configs]
        assert len(names) == len(set(names))
        assert all(c.resolved()["iterations"] == c.steps for c in configs)
    assert gpu.paired_config(False).resolved()["train_batch_tokens"] == 8 * 65536


def test_self_check_measures_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    args = ["--device", "cpu", "--tiny", "--out", str(out), "--peak-tflops", "1", "--only", "whole"]
    assert gpu.main(args) == 0
    first = json.loads(out.read_text())["configs"]
    assert list(first) == ["tiny-whole-eager"]
    figures = first["tiny-whole-eager"]
    assert figures["status"] == "ok" and figures["commit"]
    assert figures["tokens_per_s"] == pytest.approx(128 / figures["step_ms"] * 1e3)
    assert 0 < figures["mfu"] < figures["mfu_attention"] < 1
    assert figures["before_step_1_s"] > 0 and figures["peak_memory_bytes"] > 0
    assert "tiny-whole-eager" in capsys.readouterr().out
    assert gpu.main(args) == 0
    assert json.loads(out.read_text())["configs"] == first
    assert gpu.main([*args, "--only", "", "--seconds", "0"]) == 0
    assert "1 configuration(s) not started" in capsys.readouterr().out


def test_without_cuda_it_says_so() -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and "--device cpu --tiny" in done.stderr


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A little export in the challenge's layout, with a tokenizer of 300 pieces."""
    root = tmp_path / "export"
    data = root / "datasets" / "fineweb10B_sp300"
    (root / "tokenizers").mkdir(parents=True)
    data.mkdir(parents=True)
    prefix = root / "tokenizers" / "fineweb_300_bpe"
    words = " ".join(f"{a}{b}{c}" for a in "bcdfglmnprst" for b in "aeiou" for c in "bdgklmnprst")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 5), model_prefix=str(prefix), vocab_size=300, model_type="bpe",
        byte_fallback=True, bos_id=1, eos_id=2, unk_id=3, pad_id=0, hard_vocab_limit=False, minloglevel=2,
    )
    ids = np.random.default_rng(0).integers(270, 299, 4000).astype(np.uint16)
    write_shard(data / "fineweb_train_000000.bin", ids)
    write_shard(data / "fineweb_val_000000.bin", ids[:700])
    return data


def test_the_pair_runs_the_script_unchanged_on_the_same_settings(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train_gpt.py"
    wanted = ["ITERATIONS", "VOCAB_SIZE", "MODEL_DIM", "TRAIN_BATCH_TOKENS", "MAX_WALLCLOCK_SECONDS", "DATA_PATH",
              "TOKENIZER_PATH", "WARMDOWN_ITERS", "SEED"]
    script.write_text(
        f"import os, json\njson.dump({{k: os.environ[k] for k in {wanted}}}, open('seen.json', 'w'))\n"
        f"os.replace('seen.json', {str(tmp_path / 'seen.json')!r})\nprint({LOG!r})\n"
    )
    small = gpu.Config("paired", 12, False, dict(gpu.paired_config(True).knobs) | {"vocab_size": 300})
    monkeypatch.setattr(gpu, "paired_config", lambda tiny: small)
    out = tmp_path / "r.json"
    code = gpu.main(["--device", "cpu", "--tiny", "--only", "none", "--data", str(published), "--official", str(script),
                     "--out", str(out)])
    stored = json.loads(out.read_text())["configs"]
    assert code == 0, stored
    seen: dict[str, Any] = json.loads((tmp_path / "seen.json").read_text())
    assert seen["TOKENIZER_PATH"].endswith("fineweb_300_bpe.model") and seen["DATA_PATH"] == str(published)
    want = {"ITERATIONS": "12", "VOCAB_SIZE": "300", "MODEL_DIM": "32", "WARMDOWN_ITERS": "1"}
    assert {k: seen[k] for k in want} == want
    assert float(seen["MAX_WALLCLOCK_SECONDS"]) == 0 and seen["SEED"] == str(gpu.SEED)
    assert stored["official"]["val_bpb"] == 3.03112233
    assert stored["paired"]["val_bpb"] > 0
    text = capsys.readouterr().out
    assert "3.0311" in text and f"{stored['paired']['val_bpb']:.4f}" in text


def test_a_script_that_fails_is_reported(published: Path, tmp_path: Path) -> None:
    script = tmp_path / "train_gpt.py"
    script.write_text("raise RuntimeError('CUDA is required')\n")
    figures = official.run(script, REGISTRY.defaults(), published, tmp_path / "w", 1, 60.0)
    assert figures["status"] == "failed" and "CUDA is required" in figures["error"]


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu"]) == 2
    assert "self-check" in capsys.readouterr().err
    missing = ["--official", str(tmp_path / "none.py"), "--data", str(tmp_path)]
    assert gpu.main(["--device", "cpu", "--tiny", *missing]) == 2
    assert "--official" in capsys.readouterr().err
