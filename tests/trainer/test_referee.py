"""trainer.referee end to end: artifact file and data folder in, score.json out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer import referee
from trainer.contract import Failure, ScoreResult, ScoreSpec, dump, load, load_outcome
from trainer.data.build import build
from trainer.data.bytecount import ByteTable
from trainer.data.layout import open_folder
from trainer.data.shards import open_shard
from trainer.export import export_model
from trainer.export.artifact import encode_state
from trainer.export.codecs import decode
from trainer.model.gpt import GPT, build_model
from trainer.referee import main_score
from trainer.tree import evaluator_hash

REPO = Path(__file__).resolve().parents[2]
SEQ = 16
VOCAB = 300


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 60 small documents of made-up text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij éß", k=rng.randint(1, 7))).strip() or "x" for _ in range(150)]
    folder = tmp_path_factory.mktemp("data")
    with (folder / "docs.jsonl").open("w", encoding="utf-8") as f:
        for _ in range(60):
            f.write(json.dumps({"text": " ".join(rng.choices(words, k=120))}) + "\n")
    build(folder / "docs.jsonl", folder / "built", VOCAB, val_docs=10, dev_docs=5, holdout_docs=5)
    return folder / "built"


def model_knobs(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2,
        "train_seq_len": SEQ, "train_batch_tokens": 4 * SEQ, "keep_float_max_numel": 512, **more,
    }


def small_model(**more: Any) -> GPT:
    model = build_model(model_knobs(**more))
    model.init_weights(3)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # output projections start at zero: make every tensor matter
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def make_spec(tmp_path: Path, data: Path, model: GPT | None = None, knobs: dict[str, Any] | None = None,
              **more: Any) -> ScoreSpec:
    """Export ``model`` and write a spec that scores it."""
    settings = model_knobs() if knobs is None else knobs
    (tmp_path / "run").mkdir(exist_ok=True)
    artifact = tmp_path / "artifact.bin"
    info = export_model((model or small_model()).state_dict(), settings, artifact)
    fields: dict[str, Any] = {
        "run_id": "r1", "artifact_path": str(artifact), "artifact_sha256": info.sha256, "data_dir": str(data),
        "out_dir": str(tmp_path / "run"), "seq_len": SEQ, "batch_seqs": 5,
    }
    return ScoreSpec(**(fields | more))


def run(spec: ScoreSpec, tmp_path: Path) -> tuple[int, ScoreResult | Failure]:
    dump(spec, tmp_path / "score_spec.json")
    code = main_score(tmp_path / "score_spec.json")
    return code, load_outcome(ScoreResult, Path(spec.out_dir) / "score.json")


def events(spec: ScoreSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(spec.out_dir) / "events.jsonl").read_text().splitlines()]


def scored_by_hand(model: GPT, data: Path, split: str, max_tokens: int) -> tuple[float, int, int]:
    """(nats/token, tokens, bytes): numpy float64 over the shard files, one window at a time."""
    folder = open_folder(data)
    tokens = np.concatenate([open_shard(p) for p in folder.shards[split]])[: max_tokens or None].astype(np.int64)
    windows = (len(tokens) - 1) // SEQ
    table = ByteTable.from_model(folder.tokenizer)
    nll, size = 0.0, 0
    for w in range(windows):
        ids = tokens[w * SEQ : w * SEQ + SEQ + 1]
        with torch.no_grad():
            z = model.logits(torch.from_numpy(ids[None, :-1])).numpy()[0].astype(np.float64)
        z = z - z.max(axis=1, keepdims=True)
        nll += float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(SEQ), ids[1:]]).sum())
        size += int(table.per_token(ids[:-1], ids[1:]).sum())
    return nll / (windows * SEQ), windows * SEQ, size


@pytest.mark.parametrize("container,compressor", [("flat", "zstd"), ("challenge", "zlib")])
@pytest.mark.parametrize("split,max_tokens", [("val", 0), ("dev", 1000), ("holdout", SEQ + 1), ("val", 2 * SEQ)])
def test_score_equals_scoring_the_dequantised_weights_by_hand(
    tmp_path: Path, data_dir: Path, container: str, compressor: str, split: str, max_tokens: int
) -> None:
    knobs = model_knobs(container=container, compressor=compressor)
    model = small_model()
    spec = make_spec(tmp_path, data_dir, model, knobs, split=split, max_tokens=max_tokens)
    code, result = run(spec, tmp_path)
    assert code == 0 and isinstance(result, ScoreResult)
    twin = build_model(model_knobs())
    twin.load_state_dict({e.name: decode(e) for e in encode_state(model.state_dict(), knobs)})
    loss, tokens, size = scored_by_hand(twin, data_dir, split, max_tokens)
    assert (result.tokens, result.bytes) == (tokens, size)
    assert result.val_loss == pytest.approx(loss, rel=1e-5)
    assert result.val_bpb == pytest.approx(loss / math.log(2) * tokens / size, rel=1e-5)
    assert result.run_id == "r1" and result.split == split and result.eval_seconds > 0
    assert result.artifact_sha256 == spec.artifact_sha256 and result.evaluator_hash == evaluator_hash()
    assert result.data_fingerprint == open_folder(data_dir).fingerprint


def test_quantisation_is_what_is_scored(tmp_path: Path, data_dir: Path) -> None:
    """A control against a referee that would score the unquantised weights: the two must differ here."""
    model = small_model()
    code, result = run(make_spec(tmp_path, data_dir, model, model_knobs(int8_clip_quantile=0.6)), tmp_path)
    loss, _, _ = scored_by_hand(model, data_dir, "val", 0)
    assert code == 0 and isinstance(result, ScoreResult) and abs(result.val_loss - loss) > 1e-3


def test_repeats_are_bit_identical_and_events_tell_the_way(tmp_path: Path, data_dir: Path) -> None:
    spec = make_spec(tmp_path, data_dir)
    threads = torch.get_num_threads()
    _, one = run(spec, tmp_path)
    log = events(spec)
    _, two = run(spec, tmp_path)
    assert isinstance(one, ScoreResult) and isinstance(two, ScoreResult)
    assert one.val_loss == two.val_loss and one.val_bpb == two.val_bpb
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()
    assert [e["name"] for e in log if e["kind"] == "phase"] == ["data", "load", "score"]
    last = [e for e in log if e["kind"] == "score"][-1]
    assert last["windows"] == last["of"] == one.tokens // SEQ
    assert log[-1]["kind"] == "finished" and all(isinstance(e["t"], float) for e in log)


def test_a_technique_in_the_artifact_comes_back(tmp_path: Path, data_dir: Path) -> None:
    knobs = model_knobs(smear_gate=True, mlp_neg_slope=0.5, attn_out_gate=True)
    model = small_model(smear_gate=True, mlp_neg_slope=0.5, attn_out_gate=True)
    _, result = run(make_spec(tmp_path, data_dir, model, knobs), tmp_path)
    twin = build_model(knobs)
    twin.load_state_dict({e.name: decode(e) for e in encode_state(model.state_dict(), knobs)})
    loss, _, _ = scored_by_hand(twin, data_dir, "val", 0)
    assert isinstance(result, ScoreResult) and result.val_loss == pytest.approx(loss, rel=1e-5)


def failing(spec: ScoreSpec, tmp_path: Path) -> Failure:
    code, outcome = run(spec, tmp_path)
    assert code == 3 and isinstance(outcome, Failure) and outcome.run_id == spec.run_id
    last = events(spec)[-1]
    assert (last["kind"], last["reason"], last["error"]) == ("failed", outcome.failure, outcome.error)
    assert "\n" not in outcome.error
    return outcome


def test_corrupt_artifact_is_an_export_failure_without_traceback(
    tmp_path: Path, data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(tmp_path, data_dir)
    run(spec, tmp_path)  # leaves a good score.json that must not survive
    path = Path(spec.artifact_path)
    good = path.read_bytes()
    cases = {"cut": good[:-7], "flip": good[:50] + bytes([good[50] ^ 1]) + good[51:], "empty": b""}
    for bad in cases.values():
        path.write_bytes(bad)
        outcome = failing(spec, tmp_path)
        assert outcome.failure == "export" and "sha256 is" in outcome.error
    path.write_bytes(b"ARPG\x01\x00")
    rehashed = ScoreSpec(**{**vars(spec), "artifact_sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    assert "truncated" in failing(rehashed, tmp_path).error
    path.unlink()
    assert "No such file" in failing(spec, tmp_path).error
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("change,message", [
    ({"drop": "skip_weights"}, "skip_weights missing"),
    ({"add": "blocks.9.attn.c_q.weight"}, "blocks.9.attn.c_q.weight not in the model"),
    ({"reshape": "blocks.0.mlp.fc.weight"}, r"blocks.0.mlp.fc.weight is \(32, 64\), expected \(64, 32\)"),
])
def test_artifact_that_does_not_fit_its_knobs(
    tmp_path: Path, data_dir: Path, change: dict[str, str], message: str
) -> None:
    spec = make_spec(tmp_path, data_dir)
    state = dict(small_model().state_dict())
    if "drop" in change:
        del state[change["drop"]]
    elif "add" in change:
        state[change["add"]] = torch.ones(3)
    else:
        state[change["reshape"]] = state[change["reshape"]].T
    info = export_model(state, model_knobs(), Path(spec.artifact_path))
    outcome = failing(ScoreSpec(**{**vars(spec), "artifact_sha256": info.sha256}), tmp_path)
    assert outcome.failure == "export"
    assert re.search(message, outcome.error), outcome.error


def test_knobs_that_ask_for_a_giant_model_cost_no_memory(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 layers of width 4,096 would take 70 GB: refused while the model has no storage yet."""
    devices: list[str] = []

    def watched(knobs: Any) -> GPT:
        model = build_model(knobs)
        devices.extend({p.device.type for p in model.parameters()})
        return model

    monkeypatch.setattr("trainer.model.gpt.build_model", watched)
    spec = make_spec(tmp_path, data_dir)
    giant = model_knobs(num_layers=64, model_dim=4096, num_heads=32, num_kv_heads=32, mlp_mult=8)
    info = export_model(small_model().state_dict(), giant, Path(spec.artifact_path))
    outcome = failing(ScoreSpec(**{**vars(spec), "artifact_sha256": info.sha256}), tmp_path)
    assert outcome.failure == "export" and "does not fit the model of its knobs" in outcome.error
    assert devices == ["meta"]


def test_vocabulary_of_another_tokenizer(tmp_path: Path, data_dir: Path) -> None:
    knobs = model_knobs(vocab_size=VOCAB + 4)
    outcome = failing(make_spec(tmp_path, data_dir, small_model(vocab_size=VOCAB + 4), knobs), tmp_path)
    assert outcome.failure == "export" and "vocab_size = 304, the data's tokenizer has 300" in outcome.error


def patch_model(monkeypatch: pytest.MonkeyPatch, logits: Any) -> None:
    monkeypatch.setattr(GPT, "logits", logits)


def test_non_finite_logits_are_nan(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(tmp_path, data_dir)
    patch_model(monkeypatch, lambda self, ids: torch.full((*ids.shape, VOCAB), float("nan")))
    assert failing(spec, tmp_path).failure == "nan"


def test_other_failures_have_their_names(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(tmp_path, data_dir)

    def raising(error: BaseException) -> Any:
        def logits(self: GPT, ids: torch.Tensor) -> torch.Tensor:
            raise error
        return logits

    for error, kind in (
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"), (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "oom"),
        (ZeroDivisionError("by zero"), "crash"),
    ):
        patch_model(monkeypatch, raising(error))
        outcome = failing(spec, tmp_path)
        assert outcome.failure == kind and outcome.error
    assert "ZeroDivisionError" in capfd.readouterr().err  # an unknown crash keeps its traceback in the log
    patch_model(monkeypatch, lambda self, ids: torch.zeros(3))
    outcome = failing(spec, tmp_path)
    assert outcome.failure == "crash" and "expected logits of shape" in outcome.error


def test_an_earlier_score_is_gone_before_scoring_begins(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a referee killed half-way would leave another attempt's figure to be believed."""
    spec = make_spec(tmp_path, data_dir)
    run(spec, tmp_path)
    seen: list[bool] = []

    def watching(self: GPT, ids: torch.Tensor) -> torch.Tensor:
        seen.append((Path(spec.out_dir) / "score.json").exists())
        return torch.zeros(*ids.shape, VOCAB)

    patch_model(monkeypatch, watching)
    assert run(spec, tmp_path)[0] == 0 and seen and not any(seen)


def test_artifact_changed_while_being_scored(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tmp_path, data_dir)

    def meddling(self: GPT, ids: torch.Tensor) -> torch.Tensor:
        Path(spec.artifact_path).write_bytes(b"other")
        return torch.zeros(*ids.shape, VOCAB)

    patch_model(monkeypatch, meddling)
    outcome = failing(spec, tmp_path)
    assert outcome.failure == "export" and "changed while" in outcome.error


def test_unusable_data_is_infrastructure(tmp_path: Path, data_dir: Path) -> None:
    spec = vars(make_spec(tmp_path, data_dir))
    missing = failing(ScoreSpec(**{**spec, "data_dir": str(tmp_path / "none")}), tmp_path)
    assert missing.failure == "infra" and "no such folder" in missing.error
    short = failing(ScoreSpec(**{**spec, "max_tokens": SEQ}), tmp_path)
    assert short.failure == "infra" and "one window" in short.error
    if not torch.cuda.is_available():
        assert failing(ScoreSpec(**{**spec, "device": "cuda:0"}), tmp_path).failure == "infra"


def test_an_edited_validation_shard_is_noticed(tmp_path: Path, data_dir: Path) -> None:
    """The fingerprint in the result must speak of the bytes that were scored."""
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    shard = next(copy.glob("*_val_*.bin"))
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(bytes(data))
    outcome = failing(make_spec(tmp_path, copy), tmp_path)
    assert outcome.failure == "infra" and shard.name in outcome.error


@pytest.mark.parametrize("field,value,message", [
    ("seq_len", 0, "seq_len = 0"), ("batch_seqs", -1, "batch_seqs = -1"), ("threads", 0, "threads = 0"),
    ("max_tokens", -5, "max_tokens = -5"), ("device", "tpu", "device = 'tpu'"), ("artifact_sha256", "abc", "64 hex"),
    ("out_dir", "/dev/null/run", "Not a directory"), ("split", "train", "split = 'train'"),
])
def test_bad_specs_exit_2_with_one_line(
    tmp_path: Path, data_dir: Path, field: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = vars(make_spec(tmp_path, data_dir)) | {field: value}
    (tmp_path / "bad.json").write_text(json.dumps(spec))
    assert main_score(tmp_path / "bad.json") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list((tmp_path / "run").iterdir())


def test_missing_spec_and_broken_json_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_score(tmp_path / "none.json") == 2
    (tmp_path / "x.json").write_text("{")
    assert main_score(tmp_path / "x.json") == 2
    assert "none.json" in capsys.readouterr().err


def test_in_a_clean_process(tmp_path: Path, data_dir: Path) -> None:
    """As the harness starts it: own process, another folder, nothing but the artifact and the data."""
    spec = make_spec(tmp_path, data_dir)
    _, here = run(spec, tmp_path)
    code = (
        "import sys; from pathlib import Path; from trainer.referee import main_score;"
        "sys.exit(main_score(Path(sys.argv[1])))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "score_spec.json")], cwd=tmp_path, env=env,
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    there = load(ScoreResult, Path(spec.out_dir) / "score.json")
    assert isinstance(here, ScoreResult)
    assert (there.val_loss, there.val_bpb, there.bytes) == (here.val_loss, here.val_bpb, here.bytes)


def test_a_constructor_that_reads_values_is_told_so(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tmp_path, data_dir)

    def reading(knobs: Any) -> GPT:
        assert float(torch.ones(1).sum()) == 1.0  # needs storage
        return build_model(knobs)

    monkeypatch.setattr("trainer.model.gpt.build_model", reading)
    outcome = failing(spec, tmp_path)
    assert outcome.failure == "crash" and "cannot be built on torch.device('meta')" in outcome.error


def test_rebuild_needs_no_hash(tmp_path: Path, data_dir: Path) -> None:
    spec = make_spec(tmp_path, data_dir)
    model, vocab = referee.rebuild(Path(spec.artifact_path), None, torch.device("cpu"))
    assert vocab == VOCAB and not model.training and not any(p.requires_grad for p in model.parameters())
