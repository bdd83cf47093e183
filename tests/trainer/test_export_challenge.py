"""trainer.export.challenge: readable by the challenge's own rules, closed to anything else."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.test_export_container import state, write
from trainer.export import ArtifactError, load_artifact


def independent_reader(data: bytes) -> dict[str, torch.Tensor]:
    """The official file as challenge_spec section 4 describes it, read without this project's code."""
    obj = torch.load(io.BytesIO(zlib.decompress(data)), weights_only=True)
    assert obj["__quant_format__"] == "int8_clean_per_row_v1"
    out = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        scale = obj["scales"][name]
        if obj.get("qmeta", {}).get(name, {}).get("scheme") == "per_row":
            values = q.numpy().astype(np.float32) * scale.numpy().astype(np.float32)[:, None]
        else:
            values = q.numpy().astype(np.float32) * np.float32(scale.item())
        out[name] = torch.from_numpy(values).to(dtype)
    for name, tensor in obj["passthrough"].items():
        original = obj.get("passthrough_orig_dtypes", {}).get(name)
        out[name] = tensor.to(getattr(torch, original)) if original else tensor
    return out


def test_challenge_artifact_is_readable_by_a_plain_reader(tmp_path: Path) -> None:
    path, data = write(tmp_path / "final_model.int8.ptz", "challenge", "zlib")
    _, ours = load_artifact(path)
    theirs = independent_reader(data)
    assert ours.keys() == theirs.keys() == state().keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype


def saved(obj: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, **kwargs)
    return buffer.getvalue()


def official(**changes: Any) -> dict[str, Any]:
    q = torch.ones(2, 3, dtype=torch.int8)
    obj: dict[str, Any] = {
        "__quant_format__": "int8_clean_per_row_v1", "quantized": {"m": q}, "scales": {"m": torch.ones(2).half()},
        "dtypes": {"m": "float32"}, "passthrough": {"w": torch.ones(2)},
        "qmeta": {"m": {"scheme": "per_row", "axis": 0}}, "autoresearch_knobs": {"num_layers": 4},
    }
    return {k: v for k, v in (obj | changes).items() if v is not None}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


CHALLENGE_BAD: list[tuple[Any, str]] = [
    (official(autoresearch_knobs=None), "expected the keys"),
    (official(hidden=torch.ones(9)), "expected the keys"),
    ([1, 2], "expected the keys"),
    (official(quantized=Evil()), "cannot be read: UnpicklingError"),
    (official(__quant_format__="other"), "format 'other'"),
    (official(scales={}), "name different tensors"),
    (official(scales=[1]), "scales is not a mapping"),
    (official(passthrough={3: torch.ones(1)}), "passthrough is not a mapping with text keys"),
    (official(passthrough={"m": torch.ones(2)}), "duplicate tensor name"),
    (official(passthrough={"w": "text"}), "w: expected a plain dense tensor"),
    (official(passthrough={"w": torch.ones(2).double()}), "unexpected stored dtype torch.float64"),
    (official(passthrough={"w": torch.ones(1).expand(10**9)}), "repeats its storage"),
    (official(passthrough={"w": torch.ones(2).to_sparse()}), "plain dense"),
    (official(passthrough={"w": torch.tensor([float("inf")])}), "w: non-finite values"),
    (official(passthrough_orig_dtypes={"w": "float32"}), "unexpected stored dtype"),
    (official(passthrough_orig_dtypes={"w": "eval"}), "dtype 'eval'"),
    (official(passthrough_orig_dtypes={"z": "float32"}), "passthrough_orig_dtypes names"),
    (official(dtypes={"m": "int8"}), "not a known float type"),
    (official(scales={"m": torch.ones(3).half()}), "do not fit"),
    (official(scales={"m": torch.ones(2)}), "unexpected stored dtype"),
    (official(scales={"m": torch.tensor([1.0, float("nan")]).half()}), "non-finite scales"),
    (official(qmeta=None), "unexpected stored dtype"),
    (official(qmeta={"m": {"scheme": "per_column", "axis": 1}}), "unknown quantisation scheme"),
    (official(qmeta={"z": {}}), "qmeta names"),
    (official(autoresearch_knobs={"num_layers": -4}), "knobs: knob num_layers"),
    (official(autoresearch_knobs={"num_layers": [4]}), "knobs: knob num_layers"),
]


def test_the_official_object_of_these_tests_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(zlib.compress(saved(official()), 9))
    got, loaded = load_artifact(path)
    assert got["num_layers"] == 4 and torch.equal(loaded["m"], torch.ones(2, 3))


@pytest.mark.parametrize("obj,message", CHALLENGE_BAD)
def test_malformed_challenge_objects_are_refused(
    tmp_path: Path, obj: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(zlib.compress(saved(obj), 9))
    with pytest.raises(ArtifactError, match=message):
        load_artifact(path)
    assert "executed" not in capsys.readouterr().out


def test_challenge_containers_other_than_a_plain_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    deflated = io.BytesIO()
    stored = io.BytesIO(saved(official()))
    with zipfile.ZipFile(stored) as src, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as dst:
        for name in src.namelist():
            dst.writestr(name, src.read(name))
    legacy = saved(official(), _use_new_zipfile_serialization=False)
    cases = [(deflated.getvalue(), "compressed"), (legacy, "not a zip"), (b"PK\x03\x04 junk", "damaged zip")]
    for payload, message in cases:
        path.write_bytes(zlib.compress(payload, 9))
        with pytest.raises(ArtifactError, match=message):
            load_artifact(path)
