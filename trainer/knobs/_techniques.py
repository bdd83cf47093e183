"""Knobs that switch techniques on. Off (the default) means absent; each has one file in trainer/techniques."""

from trainer.knobs._core import Knob

KNOBS = (
    Knob(name="resid_norm", kind=bool, default=False, role="model", phase="init", ladder=(False, True),
         doc="An extra weightless RMSNorm on the residual stream before every block.",
         source="seeds: breadth 2.6491 -> 2.6108, confirm 2.4398 -> 2.4260", cost="time, small"),
    Knob(name="mlp_neg_slope", kind=float, default=0.0, low=0, high=1, role="model", phase="init",
         ladder=(0.0, 0.25, 0.5), doc="Leaky slope before the square in the MLP: (leaky_relu(x))^2.",
         source="-0.002 to -0.003 bpb on 8xH100 at 0.5"),
    Knob(name="smear_gate", kind=bool, default=False, role="model", phase="init", ladder=(False, True),
         doc="Each token's embedding takes a learned, gated share of the previous token's (none at BOS).",
         source="catalogue, SmearGate v2: bundle, about -0.0005", cost="time, small"),
    Knob(name="attn_out_gate", kind=bool, default=False, role="model", phase="init", ladder=(False, True),
         doc="Per-head output gate 2*sigmoid(W x[:12]) on attention, zero-initialised.",
         source="catalogue: bundle 1.0719 -> 1.0714", cost="time, small"),
    Knob(name="muon_wd", kind=float, default=0.0, low=0, high=10, role="train", phase="train",
         ladder=(0.0, 0.01, 0.04, 0.09), doc="Decoupled weight decay of Muon matrices: p *= 1 - lr*wd.",
         source="catalogue: .01 -> .095, size follows RMS"),
    Knob(name="ema_decay", kind=float, default=0.0, low=0, high=0.99999, role="train", phase="averaging",
         ladder=(0.0, 0.9, 0.95, 0.98), doc="Export an exponential moving average of the weights; 0 = off.",
         source="catalogue: .997 -0.0006 on long runs"),
)
