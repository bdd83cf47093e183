"""Knobs of budget, optimizers and schedules. The challenge's step counts appear as fractions of the run."""

from collections.abc import Mapping
from typing import Any

from trainer.knobs._core import Knob, KnobError, check

KNOBS = (
    Knob(name="iterations", kind=int, default=20000, low=1, high=10_000_000, role="shape", phase="train",
         doc="Optimizer steps of the run (and of its schedules).", unit="steps"),
    Knob(name="train_batch_tokens", kind=int, default=524288, low=16, high=2**24, role="shape", phase="data",
         doc="Predicted tokens per optimizer step; a multiple of train_seq_len.", unit="tokens"),
    Knob(name="train_seq_len", kind=int, default=1024, low=8, high=65536, role="shape", phase="data",
         doc="Context length in training, and window length in scoring.", unit="tokens"),
    Knob(name="loader", kind=str, default="sequential", choices=("sequential", "shuffled"), role="shape", phase="data",
         doc="sequential: the challenge's order, the same for every seed. shuffled: windows of train_seq_len in an "
         "order (and from a phase) drawn from the seed, anew each epoch."),
    Knob(name="micro_batch_tokens", kind=int, default=0, low=0, high=2**24, role="shape", phase="train",
         doc="Tokens per micro-step of gradient accumulation; 0 = the whole batch at once.", unit="tokens"),
    Knob(name="max_wallclock_seconds", kind=float, default=0.0, low=0, high=1e6, role="shape", phase="train",
         doc="Stop training after this much training time; 0 = fixed steps. Schedules then follow the clock.",
         unit="s"),
    Knob(name="tied_embed_lr", kind=float, default=0.05, low=0, high=10, role="train", phase="train",
         ladder=(0.02, 0.03, 0.04, 0.05, 0.07, 0.1), doc="Adam learning rate of the tied embedding.",
         source="seeds: 0.04 kept; catalogue: .03 with .02/.02", requires=(("tie_embeddings", "==", True),)),
    Knob(name="embed_lr", kind=float, default=0.6, low=0, high=10, role="train", phase="train",
         doc="Adam learning rate of an untied embedding.", requires=(("tie_embeddings", "==", False),)),
    Knob(name="head_lr", kind=float, default=0.008, low=0, high=10, role="train", phase="train",
         doc="Adam learning rate of an untied head.", requires=(("tie_embeddings", "==", False),)),
    Knob(name="matrix_lr", kind=float, default=0.04, low=0, high=10, role="train", phase="train",
         ladder=(0.01, 0.015, 0.02, 0.03, 0.04, 0.06), doc="Muon learning rate of the 2-D block matrices.",
         source="8xH200: -0.0056 at .02/.02/.03, optimum .02-.026"),
    Knob(name="scalar_lr", kind=float, default=0.04, low=0, high=10, role="train", phase="train",
         ladder=(0.02, 0.03, 0.035, 0.04, 0.06, 0.1), doc="Adam learning rate of scales, gains and mixes.",
         source="seeds: 0.035 kept"),
    Knob(name="beta1", kind=float, default=0.9, low=0, high=0.9999, role="train", phase="train",
         ladder=(0.8, 0.85, 0.9, 0.95), doc="Adam beta1."),
    Knob(name="beta2", kind=float, default=0.95, low=0, high=0.99999, role="train", phase="train",
         ladder=(0.9, 0.95, 0.97, 0.98, 0.99, 0.995), doc="Adam beta2.",
         source="seeds: .97 -> .98 -> .99 -> .995, each confirmed"),
    Knob(name="adam_eps", kind=float, default=1e-8, low=1e-15, high=1, role="train", phase="train",
         doc="Adam epsilon."),
    Knob(name="muon_momentum", kind=float, default=0.95, low=0, high=0.9999, role="train", phase="train",
         ladder=(0.85, 0.9, 0.95, 0.97), doc="Muon momentum after its warm-up.",
         source="first measurement on pocket scale: .90 gained 0.0365"),
    Knob(name="muon_momentum_warmup_start", kind=float, default=0.85, low=0, high=0.9999, role="train", phase="train",
         doc="Muon momentum at step 0."),
    Knob(name="muon_momentum_warmup_frac", kind=float, default=0.025, low=0, high=1, role="train", phase="train",
         ladder=(0.0, 0.025, 0.1, 0.3), doc="Fraction of the run over which Muon momentum rises linearly.",
         unit="fraction of run", source="the challenge's 500 steps of 20,000"),
    Knob(name="muon_backend_steps", kind=int, default=5, low=1, high=12, role="train", phase="train",
         ladder=(3, 4, 5, 6), doc="Newton-Schulz iterations.", source="3 ties on ternary study"),
    Knob(name="grad_clip_norm", kind=float, default=0.0, low=0, high=1e6, role="train", phase="train",
         ladder=(0.0, 0.3, 0.5, 1.0), doc="Clip the global gradient norm; 0 = off.", source="seeds: 1.0 kept"),
    Knob(name="warmdown_frac", kind=float, default=0.06, low=0, high=1, role="train", phase="train",
         ladder=(0.06, 0.15, 0.3, 0.5, 0.667, 0.85, 1.0),
         doc="Fraction of the run over which learning rates fall linearly, at its end.", unit="fraction of run",
         source="catalogue: longer warm-down is one of the largest schedule gains"),
    Knob(name="min_lr", kind=float, default=0.0, low=0, high=1, role="train", phase="train",
         ladder=(0.0, 0.05, 0.1), doc="Floor of the learning-rate multiplier.", source="catalogue: >= 10% in records"),
)


@check
def batch_fits(k: Mapping[str, Any]) -> None:
    """Batches are whole sequences, micro-batches divide them."""
    seq, batch = k["train_seq_len"], k["train_batch_tokens"]
    if batch % seq:
        raise KnobError(f"train_batch_tokens = {batch}: must be a multiple of train_seq_len = {seq}")
    micro = k["micro_batch_tokens"]
    if micro and (micro % seq or batch % micro):
        raise KnobError(f"micro_batch_tokens = {micro}: a multiple of train_seq_len = {seq} that divides {batch}")
