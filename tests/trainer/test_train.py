"""The loop: golden curves, exact repetition, budgets, failures, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import model_reference as ref
from tests.trainer.test_techniques import Batches
from trainer import train
from trainer.__main__ import main, main_train
from trainer.contract import (
    EVENT_KINDS,
    EVENTS_FILE,
    RESULT_FILE,
    Failure,
    RunResult,
    RunSpec,
    dump,
    load_outcome,
)
from trainer.data.loader import TrainLoader
from trainer.data.shards import write_shard
from trainer.knobs import REGISTRY
from trainer.runtime import EventStream, RunFailed, configure, fast_exact_matmul, is_out_of_memory
from trainer.train import Trainer, train_loop

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def make_trainer(case: dict[str, Any], **change: Any) -> Trainer:
    knobs = REGISTRY.resolve(case, change)
    return Trainer(knobs, 1, Batches(knobs), CPU)


@pytest.fixture
def events(tmp_path: Path) -> Any:
    with EventStream(tmp_path / EVENTS_FILE) as stream:
        yield stream


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(0).integers(2, 260, 5000).astype(np.uint16)
    write_shard(folder / "fineweb_train_000000.bin", tokens)
    return folder


FIELDS = ("seed", "log_every", "device", "threads", "dev_every", "dev_tokens")


def spec(data: Path, out: Path, **change: Any) -> RunSpec:
    fields = {k: change.pop(k) for k in FIELDS if k in change}
    knobs = REGISTRY.resolve(ref.SMALL, {"iterations": 12}, change)
    return RunSpec(**{"run_id": "t", "seed": 3, **fields}, knobs=knobs, data_dir=str(data), out_dir=str(out))


def in_process(s: RunSpec, out: Path) -> RunResult | Failure:
    out.mkdir(exist_ok=True)
    dump(s, out / "spec.json")
    code = main(["train", str(out / "spec.json")])
    outcome = load_outcome(RunResult, out / RESULT_FILE)
    assert code == (3 if isinstance(outcome, Failure) else 0)
    return outcome


# Against the reference.


@pytest.mark.parametrize("name", list(ref.CASES))
def test_golden_curve(name: str) -> None:
    """Twenty steps of model, optimizers and schedules, against the float64 reference's stored losses."""
    golden = json.loads(ref.GOLDEN.read_text())[name]
    t = make_trainer(ref.CASES[name])
    weights = ref.made_up_weights(ref.FIXED | ref.CASES[name])
    t.model.load_state_dict({n: w.float() for n, w in weights.items()})
    assert [t.step(0.0).item() for _ in range(ref.STEPS)] == pytest.approx(golden, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ref.CASES))
def test_golden_file_is_what_the_reference_says(name: str) -> None:
    assert ref.train_curve(ref.CASES[name]) == pytest.approx(json.loads(ref.GOLDEN.read_text())[name], rel=1e-8)


@pytest.mark.parametrize("micro", [16, 32])
def test_accumulation_is_the_whole_batch(micro: int) -> None:
    whole, parts = make_trainer(ref.SMALL), make_trainer(ref.SMALL, micro_batch_tokens=micro)
    for _ in range(3):
        assert parts.step(0.0).item() == pytest.approx(whole.step(0.0).item(), rel=1e-5)


# Repetition.


def test_two_processes_make_the_same_bits(data: Path, tmp_path: Path) -> None:
    results: list[RunResult] = []
    for i in range(2):
        out = tmp_path / str(i)
        out.mkdir()
        dump(spec(data, out, smear_gate=True, ema_decay=0.9), out / "spec.json")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(i)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainer", "train", str(out / "spec.json")],
            cwd=out, env=env, capture_output=True, text=True,
        )
        assert done.returncode == 0, done.stderr
        outcome = load_outcome(RunResult, out / RESULT_FILE)
        assert isinstance(outcome, RunResult)
        results.append(outcome)
    a, b = results
    assert (a.artifact_sha256, a.final_train_loss) == (b.artifact_sha256, b.final_train_loss)
    first, second = (
        [e["train_loss"] for e in lines(tmp_path / str(i) / EVENTS_FILE) if e["kind"] == "step"] for i in range(2)
    )
    assert first == second and len(first) == 12


def test_another_seed_makes_other_bits(data: Path, tmp_path: Path) -> None:
    a, b = (in_process(spec(data, tmp_path / str(s), seed=s), tmp_path / str(s)) for s in (1, 2))
    assert isinstance(a, RunResult) and isinstance(b, RunResult)
    assert a.artifact_sha256 != b.artifact_sha256


def test_warm_up_leaves_no_trace() -> None:
    cold, warm = make_trainer(ref.SMALL, ema_decay=0.5), make_trainer(ref.SMALL, ema_decay=0.5)
    warm.warm_up()
    for _ in range(3):
        assert torch.equal(cold.step(0.0), warm.step(0.0))
    a, b = cold.final_weights(), warm.final_weights()
    assert all(torch.equal(a[n], b[n]) for n in a)


# The dev slice.


@pytest.fixture(scope="module")
def data_with_dev(data: Path) -> Path:
    write_shard(data / "fineweb_dev_000000.bin", np.random.default_rng(1).integers(2, 260, 700).astype(np.uint16))
    return data


def test_dev_events_change_nothing(data_with_dev: Path, tmp_path: Path) -> None:
    plain, seen = (in_process(spec(data_with_dev, tmp_path / str(n), dev_every=n, ema_decay=0.5), tmp_path / str(n))
                   for n in (0, 4))
    assert isinstance(plain, RunResult) and isinstance(seen, RunResult)
    assert (plain.artifact_sha256, plain.final_train_loss) == (seen.artifact_sha256, seen.final_train_loss)
    events = [e for e in lines(tmp_path / "4" / EVENTS_FILE) if e["kind"] == "dev"]
    assert [e["step"] for e in events] == [4, 8]  # none after the last step: the referee's word follows
    assert not [e for e in lines(tmp_path / "0" / EVENTS_FILE) if e["kind"] == "dev"]


def test_dev_loss_is_the_cross_entropy_of_the_slice(data_with_dev: Path, tmp_path: Path) -> None:
    s = spec(data_with_dev, tmp_path / "o", dev_every=5, dev_tokens=300)
    assert isinstance(in_process(s, tmp_path / "o"), RunResult)
    event = next(e for e in lines(tmp_path / "o" / EVENTS_FILE) if e["kind"] == "dev")
    knobs = REGISTRY.resolve(s.knobs)
    length = int(knobs["train_seq_len"])
    t = Trainer(knobs, s.seed, TrainLoader(data_with_dev, int(knobs["train_batch_tokens"]), length, s.seed), CPU)
    for _ in range(5):
        t.step(0.0)
    tokens = np.random.default_rng(1).integers(2, 260, 700)[: 299 // length * length + 1]
    x, y = tokens[:-1].reshape(-1, length), tokens[1:]
    with torch.no_grad():
        logits = t.model.logits(torch.from_numpy(x)).double().numpy().reshape(len(y), -1)
    logits -= logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    assert event["tokens"] == len(y)
    assert event["dev_loss"] == pytest.approx(loss.mean(), rel=1e-5)


def test_dev_events_need_a_dev_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_shard(folder / "fineweb_train_000000.bin", np.full(5000, 9, dtype=np.uint16))
    outcome = in_process(spec(folder, tmp_path / "o", dev_every=4), tmp_path / "o")
    assert isinstance(outcome, Failure) and outcome.failure == "infra" and "dev" in outcome.error


# Results and events.


def test_result_and_events_tell_the_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    s = spec(data, out, log_every=5, micro_batch_tokens=32)
    result = in_process(s, out)
    assert isinstance(result, RunResult)
    assert (result.run_id, result.seed, result.steps, result.tokens) == ("t", 3, 12, 12 * 64)
    artifact = Path(result.artifact_path).read_bytes()
    assert result.artifact_bytes == len(artifact) > 0
    assert result.train_seconds > 0 and result.setup_seconds > 0 and result.export_seconds > 0
    assert result.step_ms > 0 and result.peak_memory_bytes > 2**20 and result.code_bytes > 0
    stream = lines(out / EVENTS_FILE)
    assert [e["kind"] for e in stream] == [
        "started", "phase", "phase", "step", "step", "step", "phase", "finished"]
    assert {e["kind"] for e in stream} <= set(EVENT_KINDS)
    assert stream[0].keys() == {"t", "kind", "trainer_path", "tree_hash", "torch", "device", "params", "steps"}
    assert stream[0]["trainer_path"] == str(ROOT / "trainer") and stream[0]["tree_hash"] == result.tree_hash
    assert stream[0]["params"] == result.params and stream[0]["steps"] == 12
    assert [e["name"] for e in stream if e["kind"] == "phase"] == ["data", "train", "export"]
    steps = [e for e in stream if e["kind"] == "step"]
    assert [(e["step"], e["of"], e["tokens"]) for e in steps] == [(5, 12, 320), (10, 12, 640), (12, 12, 768)]
    assert all(e.keys() == {"t", "kind", "step", "of", "train_loss", "lr_scale", "tokens", "elapsed_s"} for e in steps)
    assert result.final_train_loss == pytest.approx(steps[-1]["train_loss"])  # 10% of 12 steps is one step


def test_the_artifact_holds_the_average_when_one_is_kept(data: Path, tmp_path: Path) -> None:
    plain = in_process(spec(data, tmp_path / "a"), tmp_path / "a")
    average = in_process(spec(data, tmp_path / "b", ema_decay=0.9), tmp_path / "b")
    assert isinstance(plain, RunResult) and isinstance(average, RunResult)
    assert plain.final_train_loss == average.final_train_loss
    assert plain.artifact_sha256 != average.artifact_sha256


def test_the_clock_ends_the_run_and_its_schedules(monkeypatch: pytest.MonkeyPatch, events: EventStream) -> None:
    """A clock of 1 s a reading: elapsed grows whatever the machine does (three readings a step)."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(ticks)))
    t = make_trainer(ref.SMALL, iterations=1000, max_wallclock_seconds=30.0, warmdown_frac=0.5)
    losses, _, seconds = train_loop(t, events, 1)
    assert len(losses) == 11 and seconds >= 30  # the check of step n is reading 3n - 1
    assert t.lr_scale < 0.2  # the last step: the warm-down over the last half of the clock is nearly done


# Failures.


def test_a_loss_that_is_not_finite_names_its_first_step(monkeypatch: pytest.MonkeyPatch, events: EventStream) -> None:
    t = make_trainer(ref.SMALL)
    plain = t.step

    def poisoned(elapsed: float) -> torch.Tensor:
        loss = plain(elapsed)
        return loss * float("nan") if t.step_index >= 7 else loss

    monkeypatch.setattr(t, "step", poisoned)
    with pytest.raises(RunFailed, match="step 7 of 20") as caught:
        train_loop(t, events, log_every=5)
    assert caught.value.kind == "nan"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (MemoryError("all of it"), "oom", "all of it"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", "CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom", "allocate"),
        (RunFailed("nan", "loss is nan at step 3"), "nan", "step 3"),
        (ZeroDivisionError("a\nb"), "crash", "ZeroDivisionError: a b"),
    ],
)
def test_failures_are_written_with_their_kind(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, text: str
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(train, "train_loop", fail)
    outcome = in_process(spec(data, tmp_path / "out"), tmp_path / "out")
    assert isinstance(outcome, Failure) and outcome.failure == kind and text in outcome.error
    last = lines(tmp_path / "out" / EVENTS_FILE)[-1]
    assert (last["kind"], last["reason"], last["error"]) == ("failed", kind, outcome.error)


def test_export_trouble_is_an_export_failure(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "artifact.bin").mkdir(parents=True)  # a folder where the artifact should go
    outcome = in_process(spec(data, tmp_path / "out"), tmp_path / "out")
    assert isinstance(outcome, Failure) and outcome.failure == "export"


def test_weights_that_end_non_finite_are_nan(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer.final_weights
    monkeypatch.setattr(Trainer, "final_weights", lambda t: {n: w * float("inf") for n, w in plain(t).items()})
    outcome = in_process(spec(data, tmp_path / "out"), tmp_path / "out")
    assert isinstance(outcome, Failure) and outcome.failure == "nan" and "step 12" in outcome.error


def test_missing_data_is_the_machines_fault(tmp_path: Path) -> None:
    outcome = in_process(spec(tmp_path / "nowhere", tmp_path / "out"), tmp_path / "out")
    assert isinstance(outcome, Failure) and outcome.failure == "infra" and "nowhere" in outcome.error


def test_a_plain_allocation_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "RunSpec.device = 'tpu'"), ({"threads": 0}, "RunSpec.threads = 0"),
        ({"seed": -1}, "RunSpec.seed = -1"), ({"log_every": 0}, "RunSpec.log_every = 0"),
        ({"dev_every": -1}, "RunSpec.dev_every = -1"), ({"dev_tokens": -1}, "RunSpec.dev_tokens = -1"),
        ({"vocab_size": 300, "device": "cuda:99"}, "cuda:99"),
    ],
)
def test_bad_specs_exit_2_without_a_result(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "spec.json"
    dump(spec(data, tmp_path / "out", **change), path)
    assert main_train(path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / RESULT_FILE).exists()


def test_tokens_beyond_the_vocabulary_are_the_specs_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "fineweb_train_000000.bin", np.full(5000, 900, dtype=np.uint16))
    dump(spec(tmp_path, tmp_path / "out"), tmp_path / "spec.json")
    assert main_train(tmp_path / "spec.json") == 2
    assert "vocab_size = 260" in capsys.readouterr().err


def test_bad_files_fail_fast_and_without_torch(tmp_path: Path) -> None:
    bad = {"run_id": "x", "seed": 1, "knobs": {"num_layer": 3}, "data_dir": "d", "out_dir": "o"}
    (tmp_path / "spec.json").write_text(json.dumps(bad))
    code = (
        "import sys; from trainer.__main__ import main; "
        f"print(main(['train', {str(tmp_path / 'spec.json')!r}]), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "num_layer" in done.stderr and "Traceback" not in done.stderr


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2 and main([]) == 2 and main(["fly", "x"]) == 2
    assert "trainer train SPEC.json" in capsys.readouterr().err


def test_sigterm_ends_it_even_if_the_parent_ignored_it(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    dump(spec(data, out, iterations=1_000_000), out / "spec.json")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "trainer", "train", str(out / "spec.json")], cwd=out,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    )
    try:
        path = out / EVENTS_FILE
        for _ in range(1200):
            if path.exists() and '"step"' in path.read_text():
                break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM
    finally:
        process.kill()
    assert not (out / RESULT_FILE).exists()


def test_the_fast_products_are_still_fp32(data: Path, tmp_path: Path) -> None:
    configure(spec(data, tmp_path))
    fast_exact_matmul()
    g = torch.Generator().manual_seed(5)
    for shape in ((300, 200), (6, 64, 96)):
        x = torch.randn(shape, generator=g)
        assert (x @ x.mT - x.double() @ x.double().mT).abs().max() < 1e-3
    assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
