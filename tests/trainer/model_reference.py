"""The challenge's model and optimizers once more, in plain float64, straight from its description.

Shares no code with ``trainer``. ``python -m tests.trainer.model_reference`` (from the repository root) writes
the golden loss curves in ``tests/golden/loss_curves.json``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

torch.set_num_threads(1)  # tensors this small only wait for each other's threads, dearly on a busy machine

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "loss_curves.json"
STEPS = 20
SMALL: dict[str, Any] = {
    "vocab_size": 260, "num_layers": 3, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 2,
    "train_seq_len": 16, "train_batch_tokens": 64, "iterations": STEPS,
    "warmdown_frac": 0.3, "muon_momentum_warmup_frac": 0.2, "matrix_lr": 0.01, "tied_embed_lr": 0.01, "scalar_lr": 0.01,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "varied": SMALL | {
        "num_layers": 4, "num_kv_heads": 1, "tie_embeddings": False, "grad_clip_norm": 0.5, "min_lr": 0.1,
        "logit_softcap": 15.0, "micro_batch_tokens": 32, "embed_lr": 0.02,
    },
}
FIXED: dict[str, Any] = {
    "tie_embeddings": True, "rope_base": 1e4, "logit_softcap": 30.0, "grad_clip_norm": 0.0, "min_lr": 0.0,
    "tied_embed_lr": 0.05, "embed_lr": 0.6, "head_lr": 0.008, "matrix_lr": 0.04, "scalar_lr": 0.04,
    "beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-8, "muon_momentum": 0.95, "muon_momentum_warmup_start": 0.85,
    "muon_backend_steps": 5,
}
"""The challenge's values for what a case leaves open, written down here a second time on purpose."""


def names_and_shapes(k: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """State-dict names and shapes as the challenge's description lists them."""
    d, head = k["model_dim"], k["model_dim"] // k["num_heads"]
    kv, hidden = head * k["num_kv_heads"], d * k["mlp_mult"]
    out: dict[str, tuple[int, ...]] = {"tok_emb.weight": (k["vocab_size"], d)}
    if k["num_layers"] > 1:
        out["skip_weights"] = (k["num_layers"] // 2, d)
    for i in range(k["num_layers"]):
        out |= {
            f"blocks.{i}.attn_scale": (d,), f"blocks.{i}.mlp_scale": (d,), f"blocks.{i}.resid_mix": (2, d),
            f"blocks.{i}.attn.c_q.weight": (d, d), f"blocks.{i}.attn.c_k.weight": (kv, d),
            f"blocks.{i}.attn.c_v.weight": (kv, d), f"blocks.{i}.attn.proj.weight": (d, d),
            f"blocks.{i}.attn.q_gain": (k["num_heads"],),
            f"blocks.{i}.mlp.fc.weight": (hidden, d), f"blocks.{i}.mlp.proj.weight": (d, hidden),
        }
    if not k.get("tie_embeddings", True):
        out["lm_head.weight"] = (k["vocab_size"], d)
    return out


def made_up_weights(k: dict[str, Any]) -> dict[str, Tensor]:
    """Weights from a formula (quasi-random, no generator), every parameter away from zero."""
    out: dict[str, Tensor] = {}
    offset = 1
    for name, shape in names_and_shapes(k).items():
        n = math.prod(shape)
        index = torch.arange(offset, offset + n, dtype=torch.float64)
        even = (index * 0.6180339887498949).frac() - 0.5  # additive recurrence: even over (-1/2, 1/2)
        offset += n
        if len(shape) == 2 and "resid_mix" not in name and name != "skip_weights":
            out[name] = (even / math.sqrt(shape[1])).view(shape)
        else:
            out[name] = (1.0 + 0.3 * even).view(shape)
    return out


def made_up_batch(k: dict[str, Any], step: int) -> tuple[Tensor, Tensor]:
    """A batch with something to learn: a token follows from the one before, and now and then does not."""
    rows, length, vocab = k["train_batch_tokens"] // k["train_seq_len"], k["train_seq_len"], k["vocab_size"]
    stream = [(step * 37) % vocab]
    for i in range(rows * (length + 1) - 1):
        jump = 11 if (i + step) % 5 == 0 else 0
        stream.append((stream[-1] * 3 + 7 + jump) % vocab)
    window = torch.tensor(stream).view(rows, length + 1)
    return window[:, :-1], window[:, 1:]


def normed(x: Tensor) -> Tensor:
    """x over its root mean square."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 2.0**-23).sqrt()


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of [B, T, H, h], pair (i, i + h/2) by angle t · base^(-2i/h)."""
    out = x.clone()
    half = x.shape[-1] // 2
    for t in range(x.shape[1]):
        for i in range(half):
            angle = t * base ** (-2 * i / x.shape[-1])
            a, b = x[:, t, :, i], x[:, t, :, i + half]
            out[:, t, :, i] = a * math.cos(angle) + b * math.sin(angle)
            out[:, t, :, i + half] = -a * math.sin(angle) + b * math.cos(angle)
    return out


def attention_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped attention, one (batch, head, position) at a time."""
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                keys, values = k[b, : t + 1, h // group], v[b, : t + 1, h // group]
                weights = torch.softmax((keys @ q[b, t, h]) / math.sqrt(width), 0)
                out[b, t, h] = weights @ values
    return out


def logits(w: dict[str, Tensor], k: dict[str, Any], ids: Tensor) -> Tensor:
    """Ids [B, T] -> capped logits [B, T, V]."""
    layers, half, heads = k["num_layers"], k["num_layers"] // 2, k["num_heads"]
    x = x0 = normed(w["tok_emb.weight"][ids])
    saved: list[Tensor] = []
    for i in range(layers):
        p = {n.removeprefix(f"blocks.{i}."): t for n, t in w.items() if n.startswith(f"blocks.{i}.")}
        if i >= half and i - half < half:
            x = x + w["skip_weights"][i - half] * saved[half - 1 - (i - half)]
        x = p["resid_mix"][0] * x + p["resid_mix"][1] * x0
        h = normed(x)
        split = [(h @ p[f"attn.{n}.weight"].T).unflatten(-1, (c, -1))
                 for n, c in (("c_q", heads), ("c_k", k["num_kv_heads"]), ("c_v", k["num_kv_heads"]))]
        q = rotate(normed(split[0]), k["rope_base"]) * p["attn.q_gain"][:, None]
        y = attention_loop(q, rotate(normed(split[1]), k["rope_base"]), split[2])
        x = x + p["attn_scale"] * (y.flatten(2) @ p["attn.proj.weight"].T)
        hidden = torch.clamp(normed(x) @ p["mlp.fc.weight"].T, min=0) ** 2
        x = x + p["mlp_scale"] * (hidden @ p["mlp.proj.weight"].T)
        if i < half:
            saved.append(x)
    head = w["tok_emb.weight"] if k["tie_embeddings"] else w["lm_head.weight"]
    return k["logit_softcap"] * torch.tanh(normed(x) @ head.T / k["logit_softcap"])


def mean_loss(w: dict[str, Tensor], k: dict[str, Any], ids: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets."""
    z = logits(w, k, ids)
    return (torch.logsumexp(z, -1) - z.gather(-1, targets[..., None])[..., 0]).mean()


def orthogonalised(g: Tensor, steps: int) -> Tensor:
    """Newton-Schulz of one matrix."""
    x = g / (g.norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def train_curve(case: dict[str, Any]) -> list[float]:
    """Losses of ``STEPS`` training steps from :func:`made_up_weights`."""
    k = FIXED | case
    w = {n: t.requires_grad_() for n, t in made_up_weights(k).items()}
    state = {n: [torch.zeros_like(t), torch.zeros_like(t)] for n, t in w.items()}
    embed_lr = k["tied_embed_lr"] if k["tie_embeddings"] else k["embed_lr"]
    curve: list[float] = []
    for step in range(STEPS):
        loss = mean_loss(w, k, *made_up_batch(k, step))
        grads = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        if k["grad_clip_norm"]:
            total = torch.sqrt(torch.stack([g.pow(2).sum() for g in grads.values()]).sum())
            factor = min(1.0, k["grad_clip_norm"] / float(total + 1e-6))
            grads = {n: g * factor for n, g in grads.items()}
        left, warm = 1 - step / STEPS, min(1.0, step / STEPS / k["muon_momentum_warmup_frac"])
        scale = 1.0 if left >= k["warmdown_frac"] else max(left / k["warmdown_frac"], k["min_lr"])
        mu = (1 - warm) * k["muon_momentum_warmup_start"] + warm * k["muon_momentum"]
        for n, t in w.items():
            g, (m, v) = grads[n], state[n]
            with torch.no_grad():
                if n.startswith("blocks.") and n.endswith(".weight"):
                    m.copy_(mu * m + g)
                    update = orthogonalised(g + mu * m, k["muon_backend_steps"])
                    t -= k["matrix_lr"] * scale * math.sqrt(max(1.0, t.shape[0] / t.shape[1])) * update
                    continue
                lr = {"tok_emb.weight": embed_lr, "lm_head.weight": k["head_lr"]}.get(n, k["scalar_lr"])
                m.copy_(k["beta1"] * m + (1 - k["beta1"]) * g)
                v.copy_(k["beta2"] * v + (1 - k["beta2"]) * g * g)
                m_hat, v_hat = m / (1 - k["beta1"] ** (step + 1)), v / (1 - k["beta2"] ** (step + 1))
                t -= lr * scale * m_hat / (v_hat.sqrt() + k["adam_eps"])
        curve.append(loss.item())
    return curve


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: train_curve(case) for name, case in CASES.items()}, indent=1) + "\n")
