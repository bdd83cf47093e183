"""trainer.export.codecs and policy, against an independent numpy reading of challenge_spec section 4."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.export.codecs import Encoded, decode, encode
from trainer.export.errors import ExportError, NonFiniteTensorError
from trainer.export.policy import codec_for, is_control

QUANTILE = 0.9999984


def enc(tensor: torch.Tensor, name: str = "w", quantile: float = QUANTILE, keep: int = 0) -> Encoded:
    return encode(name, tensor, clip_quantile=quantile, keep_float_max_numel=keep)


def scale_of(entry: Encoded) -> torch.Tensor:
    assert entry.scale is not None
    return entry.scale


def reference_clip(row: np.ndarray, quantile: float) -> float:
    """Linear-interpolation quantile of |row| in float64, the rank taken in fp32 as torch takes it."""
    ordered = np.sort(np.abs(row.astype(np.float64).ravel()))
    rank = float(np.float32(quantile) * np.float32(len(ordered) - 1))
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (rank - low) * (ordered[high] - ordered[low]))


@pytest.mark.parametrize("quantile", [0.5, 0.99, 0.999, QUANTILE, 1.0])
@pytest.mark.parametrize("spread", [0.02, 1.0, 40.0])
def test_per_row_codes_and_scales_match_numpy(quantile: float, spread: float) -> None:
    rng = np.random.default_rng(7)
    w = (rng.standard_normal((23, 301)) * spread * rng.uniform(0.1, 3, (23, 1))).astype(np.float32)
    entry = enc(torch.from_numpy(w), quantile=quantile)
    assert entry.codec == "int8_row" and scale_of(entry).dtype == torch.float16
    for i, row in enumerate(w):
        clip = reference_clip(row, quantile)
        scale = max(clip / 127, 1 / 127)
        ratio = np.clip(row.astype(np.float64), -clip, clip) / scale
        codes = np.clip(np.rint(ratio), -127, 127)
        got = entry.data[i].numpy().astype(np.float64)
        # fp32 against fp64 may only disagree where the ratio is next to a half
        unclear = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) < 1e-3
        assert np.array_equal(got[~unclear], codes[~unclear])
        assert np.abs(got - codes).max() <= 1
        assert float(scale_of(entry)[i]) == pytest.approx(scale, rel=2**-11)


def test_codes_use_the_unrounded_scale_and_values_the_stored_one() -> None:
    """A clip whose fp16 scale is far from the fp32 one: the two orders of rounding give other codes."""
    clip = np.float32(127 * 1.00048)  # scale 1.00048 rounds to 1.0 in fp16
    row = np.linspace(-clip, clip, 2001, dtype=np.float32)
    entry = enc(torch.from_numpy(row)[None], quantile=1.0)
    scale32 = max(clip / np.float32(127), np.float32(1 / 127))
    scale16 = np.float32(np.float16(scale32))
    assert scale16 != scale32
    codes = np.rint(row / scale32).clip(-127, 127)
    assert not np.array_equal(codes, np.rint(row / scale16).clip(-127, 127))
    assert np.array_equal(entry.data.numpy()[0], codes)
    assert np.array_equal(decode(entry).numpy()[0], codes.astype(np.float32) * scale16)


def test_rows_below_one_share_the_floor() -> None:
    entry = enc(torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 0.1)
    assert torch.equal(scale_of(entry), torch.full((6,), 1 / 127, dtype=torch.float16))
    zero = enc(torch.zeros(3, 4))
    assert not zero.data.any() and not decode(zero).any()


floats32 = st.floats(-300, 300, width=32)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 5), cols=st.integers(1, 40), data=st.data(),
    quantile=st.sampled_from([0.5, 0.9, QUANTILE, 1.0]), ndim=st.sampled_from([1, 2, 3]),
)
def test_error_law(rows: int, cols: int, data: st.DataObject, quantile: float, ndim: int) -> None:
    """|w - decoded| <= scale/2 + |code| * |stored - exact scale| where w is not clipped."""
    values = data.draw(st.lists(floats32, min_size=rows * cols, max_size=rows * cols))
    w = torch.tensor(values, dtype=torch.float32).reshape({1: (-1,), 2: (rows, cols), 3: (rows, 1, cols)}[ndim])
    entry = enc(w, quantile=quantile)
    back, stored = decode(entry).double(), scale_of(entry).double()
    if ndim == 2:
        clip = torch.quantile(w.abs(), quantile, dim=1, keepdim=True).double()
        stored = stored[:, None]
        exact = (clip / 127).clamp_min(1 / 127)
    else:
        clip = torch.quantile(w.abs().flatten(), quantile).double()
        exact = clip / 127 if float(clip) > 0 else torch.ones_like(clip)
    limit = exact / 2 + entry.data.double().abs() * (stored - exact).abs()
    target = torch.maximum(torch.minimum(w.double(), clip), -clip)
    assert bool(((target - back).abs() <= limit * (1 + 1e-5) + 1e-6 * exact + 1e-42).all())
    assert back.dtype == torch.float64 and tuple(back.shape) == tuple(w.shape)


def test_per_tensor_scale_is_fp32_and_has_no_floor() -> None:
    w = torch.linspace(-0.5, 0.25, 60).reshape(3, 4, 5)
    entry = enc(w, quantile=1.0)
    assert entry.codec == "int8_tensor" and scale_of(entry).dtype == torch.float32 and scale_of(entry).shape == ()
    assert float(scale_of(entry)) == pytest.approx(0.5 / 127, rel=1e-6)
    assert float(scale_of(enc(torch.zeros(2, 2, 2)))) == 1.0


@pytest.mark.parametrize("keep,numel,control,ndim,want", [
    (100, 100, False, 2, "fp16"), (100, 101, False, 2, "int8_row"), (100, 101, False, 1, "int8_tensor"),
    (100, 101, True, 2, "int8_row"), (100, 100, True, 1, "fp32"), (0, 1, False, 0, "int8_tensor"),
])
def test_policy_table(keep: int, numel: int, control: bool, ndim: int, want: str) -> None:
    got = codec_for(ndim=ndim, numel=numel, is_float=True, control=control, keep_float_max_numel=keep)
    assert got == want
    raw = codec_for(ndim=ndim, numel=numel, is_float=False, control=control, keep_float_max_numel=keep)
    assert raw == "raw"


def test_control_names_are_the_challenge_s() -> None:
    named = ["attn_scale", "attn_scales", "mlp_scale", "resid_mix", "resid_mixes", "q_gain", "skip_weights"]
    assert all(is_control(f"blocks.3.{n}") for n in named)
    assert not any(map(is_control, ["tok_emb.weight", "blocks.0.attn.c_q.weight", "blocks.0.mlp.fc.weight"]))


def test_small_tensors_and_dtypes() -> None:
    w = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    small = enc(w, keep=65536)
    assert small.codec == "fp16" and small.dtype == "float32" and decode(small).dtype == torch.float32
    assert torch.equal(decode(small), w.half().float())
    control = enc(w, name="blocks.0.resid_mix", keep=65536)
    assert control.codec == "fp32" and torch.equal(decode(control), w)
    marked = encode("at_embed.gate", w, clip_quantile=1.0, keep_float_max_numel=99, control=True)
    assert marked.codec == "fp32"
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        assert decode(enc(w.to(dtype))).dtype == dtype
        assert decode(enc(w.to(dtype), keep=100)).dtype == dtype
    steps = torch.arange(5)
    assert torch.equal(decode(enc(steps)), steps) and enc(steps).codec == "raw"


def test_source_is_never_aliased() -> None:
    for tensor, keep in ((torch.ones(4), 9), (torch.ones(4).half(), 9), (torch.arange(4), 9)):
        before = tensor.clone()
        entry = enc(tensor, name="attn_scale", keep=keep)
        tensor.add_(5)
        assert torch.equal(entry.data.to(before.dtype), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 3), (9,)])
@pytest.mark.parametrize("keep", [0, 100])
def test_non_finite_weights_are_named(bad: float, shape: tuple[int, ...], keep: int) -> None:
    w = torch.ones(shape)
    w.view(-1)[4] = bad
    with pytest.raises(NonFiniteTensorError, match=r"blocks\.1\.x.*non-finite"):
        enc(w, name="blocks.1.x", keep=keep)


def test_overflow_of_the_stored_form_is_refused() -> None:
    with pytest.raises(NonFiniteTensorError, match="fp16"):
        enc(torch.tensor([70000.0]), keep=10)
    with pytest.raises(NonFiniteTensorError, match="fp16 scales"):
        enc(torch.full((2, 2), 1e7))
    with pytest.raises(NonFiniteTensorError, match="dequantising"):
        enc(torch.full((1, 2), 65504.0, dtype=torch.float16))
    with pytest.raises(ExportError, match="complex64 cannot be stored"):
        enc(torch.zeros(2, dtype=torch.complex64))


def test_large_flat_quantile_agrees_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of torch.quantile a sort takes over; both paths must agree, rows in blocks too."""
    w = torch.randn(6, 7, 50, generator=torch.Generator().manual_seed(3))
    whole, rows = enc(w, quantile=0.97), enc(w.reshape(42, 50), quantile=0.97)
    monkeypatch.setattr("trainer.export.codecs._QUANTILE_MAX", 128)
    assert float(scale_of(enc(w, quantile=0.97))) == pytest.approx(float(scale_of(whole)), rel=1e-5)
    blocks = enc(w.reshape(42, 50), quantile=0.97)
    assert torch.equal(blocks.data, rows.data) and torch.equal(scale_of(blocks), scale_of(rows))
