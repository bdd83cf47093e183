"""Starts: a function of (seed, name) alone, with the distributions that the challenge asks for."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.trainer.model_reference import SMALL
from trainer.model.gpt import build_model
from trainer.model.init import init_params, iter_roles, param_generator


def draw(seed: int, name: str) -> list[float]:
    return torch.rand(8, generator=param_generator(seed, name)).tolist()


def test_generator_is_seeded_by_sha256_of_seed_and_name() -> None:
    digest = hashlib.sha256(b"7:blocks.0.attn.c_q.weight").digest()
    expected = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    assert draw(7, "blocks.0.attn.c_q.weight") == torch.rand(8, generator=expected).tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.text(max_size=20), st.text(max_size=20))
def test_draws_repeat_and_differ(seed: int, other: int, name: str, second: str) -> None:
    assert draw(seed, name) == draw(seed, name)
    assert (draw(seed, name) == draw(other, second)) == ((seed, name) == (other, second))


def test_the_global_generator_plays_no_part() -> None:
    torch.manual_seed(1)
    first, second = build_model(SMALL), build_model(SMALL)
    first.init_weights(5)
    torch.manual_seed(2)
    torch.rand(100)
    second.init_weights(5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_deeper_model_leaves_shared_names_alone() -> None:
    shallow, deep = build_model(SMALL), build_model(SMALL | {"num_layers": 4})
    shallow.init_weights(3)
    deep.init_weights(3)
    want, have = shallow.state_dict(), deep.state_dict()
    shared = [n for n in want if n != "skip_weights"]
    assert all(torch.equal(want[n], have[n]) for n in shared)


@pytest.mark.parametrize("tied", [True, False])
def test_starting_distributions(tied: bool) -> None:
    model = build_model({**SMALL, "model_dim": 256, "qk_gain_init": 2.25, "tie_embeddings": tied})
    model.init_weights(0)
    w = model.state_dict()
    assert torch.isclose(w["tok_emb.weight"].std(), torch.tensor(0.005 if tied else 1.0), rtol=0.02)
    for name, tensor in w.items():
        if name.endswith((".c_q.weight", ".c_k.weight", ".c_v.weight", ".fc.weight")):
            bound = 1 / math.sqrt(256)
            assert tensor.abs().max() <= bound
            assert torch.isclose(tensor.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05), name
        elif name.endswith(".proj.weight") or name == "lm_head.weight":
            assert not tensor.any()
        elif name.endswith("q_gain"):
            assert (tensor == 2.25).all()
        elif name.endswith("resid_mix"):
            assert (tensor[0] == 1).all() and (tensor[1] == 0).all()
        elif name != "tok_emb.weight":
            assert (tensor == 1).all(), name


def test_roles_follow_the_challenges_groups() -> None:
    model = build_model(SMALL | {"tie_embeddings": False})
    for name, param, role in iter_roles(model):
        if name == "tok_emb.weight":
            assert role.group == "embed"
        elif name == "lm_head.weight":
            assert role.group == "head"
        elif name.startswith("blocks.") and param.ndim == 2 and "resid_mix" not in name:
            assert (role.group, role.export) == ("matrix", "weight")
        else:
            assert (role.group, role.export) == ("scalar", "control")


def test_a_parameter_without_a_role_is_refused() -> None:
    model = build_model(SMALL)
    model.blocks[0].register_parameter("stray", nn.Parameter(torch.zeros(2)))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.stray"):
        init_params(model, 0)
