"""Optimizers and schedules against references and laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.trainer import model_reference as ref
from trainer.knobs import REGISTRY
from trainer.model.gpt import build_model
from trainer.optim.adam import Adam
from trainer.optim.groups import Optimizers, base_rates, parameter_groups
from trainer.optim.muon import Muon, newton_schulz
from trainer.optim.schedules import Schedule, run_fraction


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (64, 128)])
def test_newton_schulz_keeps_directions_and_lifts_singular_values(shape: tuple[int, int]) -> None:
    """Against the SVD: the same singular vectors, values in the known band of the quintic."""
    g = randn(3, *shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ newton_schulz(g, 5) @ vh.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-6
    big = s / s.norm(dim=1, keepdim=True) > 0.02  # five steps lift anything above this into the band
    assert big.float().mean() > 0.9
    assert values[big].min() > 0.66 and values[big].max() < 1.15


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_newton_schulz_ignores_scale(scale: float, seed: int) -> None:
    g = randn(2, 6, 9, seed=seed)
    torch.testing.assert_close(newton_schulz(g * scale, 5), newton_schulz(g, 5), rtol=1e-2, atol=2e-3)


def test_a_stack_is_the_matrices_one_by_one() -> None:
    g = randn(4, 12, 20, dtype=torch.float64)
    alone = torch.stack([ref.orthogonalised(m, 5) for m in g])
    torch.testing.assert_close(newton_schulz(g, 5), alone, rtol=1e-9, atol=1e-9)


def test_muon_follows_the_formula_for_wide_tall_and_square() -> None:
    shapes = [(8, 8), (8, 16), (16, 8), (8, 16), (24, 8)]
    params = [nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)]
    want = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(w) for w in want]
    muon = Muon(params, ns_steps=5)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * step + i)
            g = p.grad.double()
            buffers[i] = 0.9 * buffers[i] + g
            update = ref.orthogonalised(g + 0.9 * buffers[i], 5)
            want[i] = want[i] - 0.05 * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * update
        muon.step(lr=0.05, momentum=0.9)
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-3, atol=1e-4)


def test_muon_refuses_what_is_not_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"\(4,\).*scalar"):
        Muon([nn.Parameter(torch.zeros(4))], 5)


def test_a_parameter_without_gradient_is_carried_by_momentum_alone() -> None:
    p, q = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    muon = Muon([p, q], 5)
    p.grad = randn(4, 4)
    muon.step(0.1, 0.9)
    assert p.detach().any() and not q.detach().any()


def test_adam_is_torchs_adam() -> None:
    shapes, lrs = [(7, 5), (3,), (2, 4)], [0.05, 0.01]
    mine = [nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    adam = Adam([mine[:2], [], mine[2:]], 0.8, 0.95, 1e-8)
    other = torch.optim.Adam(
        [{"params": theirs[:2], "lr": lrs[0]}, {"params": theirs[2:], "lr": lrs[1]}],
        betas=(0.8, 0.95), eps=1e-8, foreach=False,
    )
    for step in range(5):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=10 * step + i)
            b.grad = a.grad.clone()
        if step == 2:
            mine[1].grad = theirs[1].grad = None
        adam.step([lrs[0], 9.9, lrs[1]])
        other.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_state_comes_back_and_reset_forgets() -> None:
    knobs = REGISTRY.defaults() | ref.SMALL
    model = build_model(ref.SMALL)
    model.init_weights(0)

    def moved(optimizers: Optimizers, seed: int) -> list[Tensor]:
        for i, p in enumerate(optimizers.params):
            p.grad = randn(*p.shape, seed=seed + i)
        optimizers.step(optimizers.rates(1.0), 0.9)
        return [p.detach().clone() for p in optimizers.params]

    first = Optimizers(model, knobs)
    fresh = [p.detach().clone() for p in first.params]
    moved(first, 0)
    kept, weights = first.state(), [p.detach().clone() for p in first.params]
    want = moved(first, 1000)
    second = Optimizers(model, knobs)
    for start, state in ((weights, kept), (fresh, None)):
        with torch.no_grad():
            for p, w in zip(second.params, start, strict=True):
                p.copy_(w)
        if state is not None:
            second.load_state(state)
            assert all(torch.equal(a, b) for a, b in zip(moved(second, 1000), want, strict=True))
            second.reset()
        else:
            assert all(torch.equal(a, b) for a, b in zip(moved(second, 0), weights, strict=True))


def test_every_parameter_is_in_one_group() -> None:
    model = build_model(ref.SMALL | {"tie_embeddings": False})
    grouped = [id(p) for g in parameter_groups(model).values() for p in g]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_rates_come_from_their_knobs(tied: bool) -> None:
    rates = {"tied_embed_lr": 1.0, "embed_lr": 2.0, "head_lr": 3.0, "scalar_lr": 4.0, "matrix_lr": 5.0}
    knobs = REGISTRY.defaults() | {"tie_embeddings": tied} | rates
    assert base_rates(knobs) == {"embed": 1.0 if tied else 2.0, "head": 3.0, "scalar": 4.0, "matrix": 5.0}


def schedule(**change: float) -> Schedule:
    values: dict[str, Any] = {
        "warmdown_frac": 0.3, "min_lr": 0.0, "momentum": 0.95, "momentum_start": 0.85, "momentum_warmup_frac": 0.1}
    return Schedule(**(values | change))


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_learning_rate_laws(a: float, b: float, warmdown: float, floor: float) -> None:
    s = schedule(warmdown_frac=warmdown, min_lr=floor)
    low, high = min(a, b), max(a, b)
    assert floor <= s.lr_scale(high) <= s.lr_scale(low) <= 1
    if low < 1 - warmdown - 1e-9:
        assert s.lr_scale(low) == 1
    if warmdown > 1e-6:  # below, 1 - warmdown is 1 in floating point
        assert s.lr_scale(1.0) == floor
        assert s.lr_scale(1 - warmdown / 2) == pytest.approx(max(0.5, floor))


@given(st.integers(0, 999))
def test_fixed_steps_reproduce_the_challenges_warmdown(step: int) -> None:
    """20,000 steps with WARMDOWN_ITERS = 1,200, by its own rule, at every 20th step."""
    i = step * 20
    want = (20000 - i) / 1200 if 20000 - i < 1200 else 1.0
    assert schedule(warmdown_frac=0.06).lr_scale(run_fraction(i, 20000, 0.0, 0.0)) == pytest.approx(want)


@given(st.floats(0, 1), st.floats(0, 1))
def test_momentum_laws(a: float, b: float) -> None:
    s, low, high = schedule(), min(a, b), max(a, b)
    assert 0.85 <= s.muon_momentum(low) <= s.muon_momentum(high) + 1e-12 <= 0.95 + 1e-12
    assert s.muon_momentum(0.0) == 0.85 and s.muon_momentum(0.1) == 0.95
    assert s.muon_momentum(0.05) == pytest.approx(0.9)
    assert schedule(momentum_warmup_frac=0.0).muon_momentum(0.0) == 0.95


def test_the_clock_leads_when_there_is_one() -> None:
    assert run_fraction(5, 10, 99.0, 0.0) == 0.5
    assert run_fraction(1, 1000, 30.0, 60.0) == 0.5
    assert run_fraction(900, 1000, 1.0, 60.0) == 0.9  # the steps will be over first
    assert run_fraction(1, 1000, 99.0, 60.0) == 1.0
