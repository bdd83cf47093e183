"""The model against a float64 reference written from the challenge's description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.trainer import model_reference as ref
from trainer.knobs import KnobError
from trainer.model.attention import _attend_cpu, _attend_cuda
from trainer.model.gpt import GPT, build_model
from trainer.model.head import CHUNK_ROWS, head_loss
from trainer.model.norm import rms_norm
from trainer.model.rope import apply_rope, rope_tables

CPU = torch.device("cpu")
SHAPES: list[dict[str, Any]] = [
    {}, {"num_layers": 1}, {"num_layers": 2, "num_kv_heads": 4}, {"num_layers": 5, "num_kv_heads": 1},
    {"tie_embeddings": False, "logit_softcap": 5.0, "mlp_mult": 3},
    {"rope_base": 100.0, "num_heads": 2, "num_kv_heads": 1},
]


def loaded(knobs: dict[str, Any]) -> GPT:
    model = build_model(knobs)
    model.load_state_dict({n: t.float() for n, t in ref.made_up_weights(knobs).items()})
    return model


def test_default_model_has_the_challenges_size() -> None:
    with torch.device("meta"):
        assert build_model({}).num_params() == 17_059_912


@pytest.mark.parametrize("change", SHAPES)
def test_names_and_shapes(change: dict[str, Any]) -> None:
    knobs = ref.SMALL | change
    have = {n: tuple(t.shape) for n, t in build_model(knobs).state_dict().items()}
    assert have == ref.names_and_shapes(knobs)


@pytest.mark.parametrize("change", SHAPES)
def test_forward_and_gradients_match_the_reference(change: dict[str, Any]) -> None:
    knobs = ref.SMALL | change
    full = ref.FIXED | knobs
    ids, targets = ref.made_up_batch(knobs, 3)
    model = loaded(knobs)
    weights = {n: t.float().double().requires_grad_() for n, t in ref.made_up_weights(knobs).items()}
    torch.testing.assert_close(model.logits(ids).double(), ref.logits(weights, full, ids), rtol=1e-4, atol=2e-5)
    loss, want = model(ids, targets), ref.mean_loss(weights, full, ids, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(want, [weights[n] for n in named])
    for (name, param), grad in zip(named.items(), grads, strict=True):
        assert param.grad is not None, name
        error = (param.grad.double() - grad).norm() / grad.norm()
        assert error < 1e-4, (name, error)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = loaded(ref.SMALL)
    ids, targets = ref.made_up_batch(ref.SMALL, 0)
    want = F.cross_entropy(model.logits(ids).flatten(0, 1).double(), targets.flatten())
    assert model(ids, targets).item() == pytest.approx(want.item(), rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 15), st.integers(0, 259))
def test_no_position_sees_what_comes_after(cut: int, token: int) -> None:
    model = loaded(ref.SMALL)
    ids, _ = ref.made_up_batch(ref.SMALL, 1)
    other = ids.clone()
    other[:, cut:] = token
    with torch.no_grad():
        assert torch.equal(model.logits(ids)[:, :cut], model.logits(other)[:, :cut])


@pytest.mark.parametrize("attend", [_attend_cpu, _attend_cuda])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_matches_a_loop(attend: Any, kv_heads: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 7, kv_heads, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in "kv")
    have, want = attend(q, k, v), ref.attention_loop(q, k, v)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
    seed = torch.randn(have.shape, generator=g, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(y, (q, k, v), seed) for y in (have, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_rotation_matches_a_loop_and_keeps_lengths() -> None:
    x = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(1))
    have = apply_rope(x, rope_tables(9, 8, 1e4, CPU))
    torch.testing.assert_close(have.double(), ref.rotate(x.double(), 1e4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(have.norm(dim=-1), x.norm(dim=-1))


def test_rotated_products_depend_on_distance_only() -> None:
    g = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 1, 1, 16, generator=g).expand(1, 40, 1, 16) for _ in "qk")
    tables = rope_tables(40, 16, 1e4, CPU)
    scores = (apply_rope(q, tables)[0, :, 0] @ apply_rope(k, tables)[0, :, 0].T).double()
    for distance in (0, 1, 17):
        along = scores.diagonal(-distance)
        assert float(along.max() - along.min()) < 1e-4


def test_every_position_of_a_long_context_is_distinct_even_for_bf16_activations() -> None:
    cos, sin = rope_tables(1024, 64, 1e4, CPU)
    assert cos.dtype == sin.dtype == torch.float32
    assert len(torch.unique(torch.cat((cos, sin), -1).flatten(1), dim=0)) == 1024
    x = torch.ones(1, 1024, 1, 64, dtype=torch.bfloat16)
    assert apply_rope(x, (cos, sin)).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_norm_and_its_gradient_match_torchs(scale: float) -> None:
    seeded = torch.Generator().manual_seed(3)
    x, g = (torch.randn(3, 5, 12, generator=seeded, dtype=torch.float64) for _ in "xg")
    x = (scale * x).requires_grad_()
    have, want = rms_norm(x), F.rms_norm(x, (12,), eps=2.0**-23)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=0)
    (mine,), (theirs,) = (torch.autograd.grad(y, x, g) for y in (have, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_norm_of_small_bf16_values_is_not_swamped() -> None:
    x = torch.full((4, 64), 0.005, dtype=torch.bfloat16)
    assert torch.allclose(rms_norm(x).float(), torch.ones(4, 64), atol=0.02)


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 100])
def test_loss_by_chunks_is_the_plain_loss(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randn(1, rows, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = (5 * torch.randn(31, 8, generator=g, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 31, (1, rows), generator=g)
    z = 3.0 * torch.tanh(hidden @ weight.T / 3.0)
    want = 2 * F.cross_entropy(z[0], targets[0])
    have = 2 * head_loss(hidden, weight, targets, 3.0)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=0)
    mine, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (have, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_knobs_are_checked_and_missing_ones_take_their_defaults() -> None:
    with pytest.raises(KnobError, match="num_layers"):
        build_model({"num_layers": 0})
    with pytest.raises(KnobError, match="unknown knob"):
        build_model({"layers": 3})
    assert build_model({"num_layers": 1, "model_dim": 64}).shape.vocab_size == 1024
