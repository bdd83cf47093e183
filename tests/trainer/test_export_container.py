"""trainer.export: artifact files written and read back; what is damaged or hostile is refused by name."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.export import ArtifactError, ExportError, export_model, load_artifact
from trainer.export import container as container_module
from trainer.export.artifact import encode_state, stored_knobs
from trainer.export.codecs import decode
from trainer.export.compress import MAX_PAYLOAD_BYTES
from trainer.export.container import pack, unpack
from trainer.knobs import REGISTRY

KINDS = [("flat", "zstd"), ("flat", "zlib"), ("challenge", "zlib"), ("challenge", "zstd")]
PRELUDE = struct.Struct("<4sBBI")


def state() -> dict[str, torch.Tensor]:
    """Every codec once, several dtypes."""
    g = torch.Generator().manual_seed(5)
    return {
        "tok_emb.weight": torch.randn(40, 16, generator=g).bfloat16(),
        "skip_weights": torch.randn(2, 16, generator=g),
        "blocks.0.attn.c_q.weight": torch.randn(16, 24, generator=g) * 3,
        "blocks.1.attn.c_q.weight": torch.randn(16, 24, generator=g),
        "blocks.0.attn.q_gain": torch.randn(4, generator=g),
        "blocks.0.gate": torch.randn(12, generator=g),
        "bank": torch.randn(5, 8, 8, generator=g),
        "steps": torch.tensor(123456789012345),
        "mask": torch.tensor([True, False, True]),
    }


def knobs(**more: Any) -> dict[str, Any]:
    return REGISTRY.resolve({"keep_float_max_numel": 100, "beta2": 0.99, "num_layers": 4, **more})


def write(path: Path, container: str = "flat", compressor: str = "zstd") -> tuple[Path, bytes]:
    export_model(state(), knobs(container=container, compressor=compressor), path)
    return path, path.read_bytes()


@pytest.mark.parametrize("container,compressor", KINDS)
def test_reload_gives_the_decoded_state_and_the_model_s_knobs(tmp_path: Path, container: str, compressor: str) -> None:
    path = tmp_path / "artifact.bin"
    settings_ = knobs(container=container, compressor=compressor)
    info = export_model(state(), settings_, path)
    data = path.read_bytes()
    assert (info.bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert {t.name for t in info.tensors} == set(state())
    loaded_knobs, loaded = load_artifact(path, info.sha256)
    want = {e.name: decode(e) for e in encode_state(state(), settings_)}
    assert loaded.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name
        assert loaded[name].dtype == state()[name].dtype or name == "skip_weights"
    assert set(loaded_knobs) == set(REGISTRY.defaults())
    assert loaded_knobs["num_layers"] == 4 and loaded_knobs["keep_float_max_numel"] == 100
    assert loaded_knobs["beta2"] == REGISTRY.get("beta2").default  # training is no part of an artifact
    assert [p.name for p in tmp_path.iterdir()] == ["artifact.bin"]


@pytest.mark.parametrize("container,compressor", KINDS)
def test_bytes_do_not_depend_on_order_path_or_time(tmp_path: Path, container: str, compressor: str) -> None:
    names = sorted(state(), key=lambda n: hashlib.sha256(n.encode()).digest())
    settings_ = knobs(container=container, compressor=compressor)
    one = export_model(state(), settings_, tmp_path / "one.bin")
    two = export_model({n: state()[n] for n in names}, dict(reversed(settings_.items())), tmp_path / "2.dat")
    assert one.sha256 == two.sha256


def test_bytes_are_equal_in_another_process(tmp_path: Path) -> None:
    """Another hash seed, another process: sets and dictionaries must not leak their order."""
    code = (
        "import sys; from pathlib import Path; from tests.trainer.test_export_container import KINDS, write\n"
        "for i, kind in enumerate(KINDS): write(Path(sys.argv[1]) / f'{i}.bin', *kind)"
    )
    root = Path(__file__).resolve().parents[2]
    env = {"PYTHONHASHSEED": "4242", "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=env, check=True)
    for i, kind in enumerate(KINDS):
        assert (tmp_path / f"{i}.bin").read_bytes() == write(tmp_path / "here.bin", *kind)[1], kind


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
names_st = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        names_st, st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES), st.integers(0, 2**31)),
        max_size=6,
    ),
    kind=st.sampled_from(KINDS), keep=st.integers(0, 30),
)
def test_round_trip_over_names_shapes_and_dtypes(
    tensors: dict[str, tuple[list[int], torch.dtype, int]], kind: tuple[str, str], keep: int
) -> None:
    made = {}
    for name, (shape, dtype, seed) in tensors.items():
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 20
        made[name] = (value > 0) if dtype == torch.bool else value.abs().to(dtype)
        if dtype.is_signed:
            made[name] = value.to(dtype)
    entries = encode_state(made, {"keep_float_max_numel": keep})
    back, stored = unpack(pack(entries, {"num_layers": 3}, *kind))
    assert stored == {"num_layers": 3}
    got = {e.name: e for e in back}
    assert got.keys() == made.keys()
    for e in entries:
        assert (got[e.name].codec, got[e.name].dtype, got[e.name].shape) == (e.codec, e.dtype, e.shape)
        assert torch.equal(decode(got[e.name]), decode(e))


@pytest.mark.parametrize("container,compressor", KINDS)
def test_damage_never_passes_the_hash_and_never_crashes(tmp_path: Path, container: str, compressor: str) -> None:
    """Truncations, flips, doubled and inserted bytes: an ArtifactError, or (hash unknown) a parse that is whole."""
    path, good = write(tmp_path / "a.bin", container, compressor)
    sha = hashlib.sha256(good).hexdigest()
    rng = random.Random(11)
    cases: list[bytes] = [good[:n] for n in (0, 1, 4, 9, 10, 11, len(good) // 2, len(good) - 1)]
    cases += [good + b"\0", good + good, b"\0" + good]
    for _ in range(250):
        i, flipped = rng.randrange(len(good)), bytearray(good)
        flipped[i] ^= 1 << rng.randrange(8)
        cases.append(bytes(flipped))
    cases += [good[: (i := rng.randrange(len(good)))] + good[i + rng.randrange(1, 9) :] for _ in range(40)]
    for bad in cases:
        if bad == good:
            continue
        path.write_bytes(bad)
        with pytest.raises(ArtifactError, match="sha256 is"):
            load_artifact(path, sha)
        try:
            _, loaded = load_artifact(path)
        except ArtifactError as e:
            assert str(path) in str(e)
        else:
            assert all(bool(torch.isfinite(t.float()).all()) for t in loaded.values())
    for bad in cases[:11]:  # cut, lengthened or shifted: never readable
        path.write_bytes(bad)
        with pytest.raises(ArtifactError):
            load_artifact(path)


def flat_bytes(header: Any, body: bytes, *, raw: bytes | None = None, length: int | None = None) -> bytes:
    text = raw if raw is not None else json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    payload = struct.pack("<I", len(text) if length is None else length) + text + body
    return PRELUDE.pack(b"ARPG", 1, 1, len(payload)) + zlib.compress(payload, 9)


def header(*tensors: list[Any], **more: Any) -> dict[str, Any]:
    return {"format": "int8_clean_per_row_v1", "knobs": {}, "tensors": list(tensors), **more}


F16 = np.array([1.0, 2.0], "<f2")
PLANES = F16.view(np.uint8).reshape(-1, 2).T.tobytes()
GOOD_ROW = ["w", "fp16", "float32", [2]]
INT8_ROW = ["m", "int8_row", "float32", [1, 2]]


def f16_planes(value: float) -> bytes:
    return np.array([value], "<f2").tobytes()


def test_the_handmade_artifact_of_these_tests_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(flat_bytes(header(INT8_ROW, GOOD_ROW), b"\x01\xff" + _joined(0.5)))
    _, loaded = load_artifact(path)
    assert torch.equal(loaded["w"], torch.tensor([1.0, 2.0]))
    assert torch.equal(loaded["m"], torch.tensor([[0.5, -0.5]]))


def _joined(scale: float) -> bytes:
    """fp16 section of INT8_ROW and GOOD_ROW: planes of [scale, 1, 2]."""
    return np.array([scale, 1.0, 2.0], "<f2").view(np.uint8).reshape(-1, 2).T.tobytes()


MALFORMED: list[tuple[str, bytes, str]] = [
    ("not an artifact", b"hello world, this is text", "bad magic"),
    ("version", PRELUDE.pack(b"ARPG", 9, 0, 4) + b"x", "version 9"),
    ("compressor", PRELUDE.pack(b"ARPG", 1, 7, 4) + b"x", "compressor id 7"),
    ("prelude", b"ARPG\x01", "truncated"),
    ("bomb declared", PRELUDE.pack(b"ARPG", 1, 1, 2**32 - 1) + b"x", "over the limit"),
    ("bomb zlib", PRELUDE.pack(b"ARPG", 1, 1, 100) + zlib.compress(bytes(10**6)), "more than 100 bytes"),
    ("bomb zstd", PRELUDE.pack(b"ARPG", 1, 0, 100) + zstandard.compress(bytes(10**6)), "more than 100"),
    ("short stream", PRELUDE.pack(b"ARPG", 1, 1, 100) + zlib.compress(bytes(50)), "50 bytes, 100 were declared"),
    ("after zlib", flat_bytes(header(GOOD_ROW), PLANES) + b"hidden", "trailing byte"),
    ("no header", PRELUDE.pack(b"ARPG", 1, 1, 2) + zlib.compress(b"ab"), "no header length"),
    ("header past end", flat_bytes(header(), b"", length=10**6), "truncated inside the header"),
    ("header huge", flat_bytes(header(), b"", length=2**31), "header length"),
    ("not JSON", flat_bytes(None, b"", raw=b"{format:"), "not JSON"),
    ("not UTF-8", flat_bytes(None, b"", raw=b"\xff\xfe"), "not JSON"),
    ("deep JSON", flat_bytes(None, b"", raw=b"[" * 200000), "not JSON"),
    ("NaN in JSON", flat_bytes(None, b"", raw=b'{"knobs":NaN}'), "not JSON"),
    ("spaces", flat_bytes(None, PLANES, raw=json.dumps(header(GOOD_ROW), sort_keys=True).encode()), "canonical"),
    ("repeated key", flat_bytes(None, b"", raw=b'{"format":1,"format":1}'), "canonical"),
    ("extra key", flat_bytes(header(hidden="text"), b""), "exactly the keys"),
    ("format", flat_bytes(header() | {"format": "int4"}, b""), "format 'int4'"),
    ("tensors", flat_bytes(header() | {"tensors": {}}, b""), "must be an object and tensors a list"),
    ("row", flat_bytes(header(["w", "fp16", "float32"]), b""), "tensor row"),
    ("duplicates", flat_bytes(header(GOOD_ROW, GOOD_ROW), PLANES * 2), r"duplicate tensor name\(s\): w"),
    ("name", flat_bytes(header(["", "fp16", "float32", [2]]), PLANES), "tensor name of 0"),
    ("codec", flat_bytes(header(["w", "exec", "float32", [2]]), PLANES), "unknown codec 'exec'"),
    ("dtype", flat_bytes(header(["w", "fp16", "object", [2]]), PLANES), "dtype 'object'"),
    ("dtype for codec", flat_bytes(header(["w", "fp32", "float16", [1]]), PLANES), "does not go with"),
    ("negative", flat_bytes(header(["w", "fp16", "float32", [-2]]), PLANES), "absurd shape"),
    ("huge dim", flat_bytes(header(["w", "fp16", "float32", [0, 2**63]]), b""), "absurd shape"),
    ("many dims", flat_bytes(header(["w", "fp16", "float32", [1] * 99]), PLANES), "absurd shape"),
    ("float dim", flat_bytes(header(["w", "fp16", "float32", [2.0]]), PLANES), "absurd shape"),
    ("bool dim", flat_bytes(header(["w", "fp16", "float32", [True, 2]]), PLANES), "absurd shape"),
    ("row codec 1-D", flat_bytes(header(["w", "int8_row", "float32", [2]]), PLANES), "absurd shape"),
    ("huge tensor", flat_bytes(header(["w", "fp16", "float32", [2**30, 2**30]]), PLANES), "data is truncated"),
    ("data short", flat_bytes(header(GOOD_ROW), PLANES[:-1]), "data is truncated"),
    ("hidden bytes", flat_bytes(header(GOOD_ROW), PLANES + b"code"), "hidden bytes"),
    ("hidden, no tensors", flat_bytes(header(), b"payload"), "hidden bytes"),
    ("infinite scale", flat_bytes(header(INT8_ROW), b"\x01\x01" + f16_planes(np.inf)), "non-finite scales"),
    ("NaN scale", flat_bytes(header(INT8_ROW), b"\x01\x01" + f16_planes(np.nan)), "non-finite scales"),
    ("zero scale", flat_bytes(header(INT8_ROW), b"\x01\x01" + f16_planes(0.0)), "must be positive"),
    ("code -128", flat_bytes(header(INT8_ROW), b"\x80\x01" + f16_planes(1.0)), "code -128"),
    ("NaN weight", flat_bytes(header(["w", "fp16", "float32", [1]]), f16_planes(np.nan)), "w: non-finite values"),
    ("bool", flat_bytes(header(["w", "raw", "bool", [1]]), b"\x02"), "bool tensor"),
    ("unknown knob", flat_bytes(header(knobs={"nope": 1}), b""), "knobs: unknown knob"),
    ("bad knob", flat_bytes(header(knobs={"num_layers": -1}), b""), "knobs: knob num_layers"),
    ("knob as text", flat_bytes(header(knobs={"num_layers": "4"}), b""), "plain form"),
    ("training knob", flat_bytes(header(knobs={"beta2": 0.99}), b""), "no place in an artifact"),
    ("knobs disagree", flat_bytes(header(knobs={"num_heads": 7}), b""), "num_heads = 7"),
]


@pytest.mark.parametrize("data,message", [c[1:] for c in MALFORMED], ids=[c[0] for c in MALFORMED])
def test_malformed_artifacts_are_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(path)


def test_zstd_stream_faults(tmp_path: Path) -> None:
    path, good = write(tmp_path / "a.bin")
    body = good[PRELUDE.size :]
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc")
    empty = zstandard.compress(b"")
    cases = [(body + b"x", "followed by"), (body + empty, "followed by"), (unsized, "declare"), (empty, "empty")]
    for bad, message in cases:
        path.write_bytes(good[: PRELUDE.size] + bad)
        with pytest.raises(ArtifactError, match=message):
            load_artifact(path)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        load_artifact(tmp_path / "none.bin")
    with pytest.raises(ArtifactError, match="directory"):
        load_artifact(tmp_path)
    huge = tmp_path / "huge.bin"
    with huge.open("wb") as f:
        f.truncate(MAX_PAYLOAD_BYTES + 1)  # sparse
    with pytest.raises(ArtifactError, match="no artifact"):
        load_artifact(huge)


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(ExportError, match="w: holds non-finite"):
        export_model({"w": torch.tensor([float("nan")])}, {}, target)
    with pytest.raises(ExportError, match="unstorable names"):
        export_model({"n" * 300: torch.ones(1)}, {}, target)
    with pytest.raises(ExportError, match="container = 'tar'"):
        container_module.pack([], {}, "tar", "zstd")
    monkeypatch.setattr("trainer.export.compress.MAX_PAYLOAD_BYTES", 1000)
    with pytest.raises(ExportError, match="over the limit of 1000"):
        export_model({"w": torch.ones(2000)}, {}, target)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_earlier_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, good = write(tmp_path / "a.bin")

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        export_model({"w": torch.zeros(3)}, {}, path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_stored_knobs_are_the_active_ones_that_shape_the_model() -> None:
    given = {"num_layers": 4, "beta2": 0.99, "smear_gate": True, "container": "challenge", "vocab_size": 1024}
    got = stored_knobs(given)
    assert got == {"num_layers": 4, "smear_gate": True}


def test_control_names_given_by_the_caller_stay_fp32(tmp_path: Path) -> None:
    w = torch.tensor([0.1, 0.2])
    export_model({"at_embed.smear_gate.lam": w, "x": w}, {}, tmp_path / "a.bin", control={"at_embed.smear_gate.lam"})
    _, loaded = load_artifact(tmp_path / "a.bin")
    assert torch.equal(loaded["at_embed.smear_gate.lam"], w) and torch.equal(loaded["x"], w.half().float())
