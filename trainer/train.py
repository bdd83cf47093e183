"""The training loop, and nothing else: RunSpec in, weights trained, artifact out, RunResult back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.contract import ARTIFACT_FILE, ContractError, KnobValue, RunResult, RunSpec
from trainer.knobs import REGISTRY
from trainer.model.gpt import GPT, build_model
from trainer.model.sites import StepView
from trainer.optim.groups import Optimizers
from trainer.optim.schedules import Schedule, run_fraction
from trainer.runtime import EventStream, RunFailed, configure, device_name, peak_memory
from trainer.techniques import TECHNIQUES

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
WARM_UP_STEPS = 2
TAIL = 0.1
"""Share of the steps whose mean loss is the run's final loss."""


class Loader(Protocol):
    """Where batches come from (``trainer.data.loader.TrainLoader``)."""

    def next(self) -> Batch:
        """Inputs and targets, each int64 [B, T]."""
        ...

    def state(self) -> dict[str, Any]:
        """Position, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back a position."""
        ...


class Trainer:
    """Model, optimizers, techniques and data of one run, moved on by :meth:`step`."""

    def __init__(
        self, knobs: Mapping[str, KnobValue], seed: int, loader: Loader, device: torch.device, compiled: bool = False
    ) -> None:
        """``knobs`` resolved. Parameters start from ``seed``."""
        self.device, self.loader = device, loader
        self.model: GPT = build_model(knobs)
        self.model.init_weights(seed)
        self.model.to(device)
        self.optimizers = Optimizers(self.model, knobs)
        self.schedule = Schedule.from_knobs(knobs)
        self.hooks = [t.train(knobs) for t in TECHNIQUES if t.train is not None and t.is_on(knobs)]
        self.named = dict(self.model.named_parameters())
        self.steps = int(knobs["iterations"])
        self.limit_s = float(knobs["max_wallclock_seconds"])
        self.batch_tokens = int(knobs["train_batch_tokens"])
        self.clip = float(knobs["grad_clip_norm"])
        micro = int(knobs["micro_batch_tokens"]) or self.batch_tokens
        self.accumulate = self.batch_tokens // micro
        self.step_index = 0
        self.lr_scale = 1.0
        self._forward = self.model
        if compiled:
            self._forward = torch.compile(self.model, dynamic=False, fullgraph=True)
            self.optimizers.muon.compile()

    def step(self, elapsed_s: float) -> Tensor:
        """One optimizer step, ``elapsed_s`` into the training clock; returns its mean loss (on the device)."""
        fraction = run_fraction(self.step_index, self.steps, elapsed_s, self.limit_s)
        self.lr_scale = self.schedule.lr_scale(fraction)
        loss = self._accumulate_grads(*self._fetch())
        rates = self.optimizers.rates(self.lr_scale)
        view = StepView(self.step_index, fraction, rates, self.optimizers.groups, self.named)
        for hook in self.hooks:
            hook.grads(view)
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.optimizers.params, self.clip)
        for hook in self.hooks:
            hook.before_update(view)
        self.optimizers.step(rates, self.schedule.muon_momentum(fraction))
        for hook in self.hooks:
            hook.after_update(view)
        self.optimizers.zero_grad()
        self.step_index += 1
        return loss

    def _fetch(self) -> tuple[Tensor, Tensor]:
        """The loader's next batch on the device."""
        x, y = self.loader.next()
        highest, vocab = int(max(x.max(), y.max())), self.model.shape.vocab_size
        if highest >= vocab:
            raise ContractError(f"knob vocab_size = {vocab}: the training data holds token id {highest}; "
                                "set vocab_size to that of the data's tokenizer")
        pair = torch.from_numpy(np.stack((x, y)))
        if self.device.type == "cuda":
            pair = pair.pin_memory().to(self.device, non_blocking=True)
        return pair[0], pair[1]

    def _accumulate_grads(self, x: Tensor, y: Tensor) -> Tensor:
        """Backward over every micro-batch; the gradients and the loss returned are means over the batch."""
        parts: list[Tensor] = []
        for xs, ys in zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True):
            loss = self._forward(xs, ys)
            (loss / self.accumulate if self.accumulate > 1 else loss).backward()
            parts.append(loss.detach())
        return parts[0] if len(parts) == 1 else torch.stack(parts).mean()

    def warm_up(self) -> None:
        """Run a few steps on made-up tokens (kernels are chosen and compiled), then undo them."""
        start = {name: p.detach().clone() for name, p in self.named.items()}
        hooks, self.hooks = self.hooks, []
        loader, self.loader = self.loader, _Noise(self.batch_tokens, self.model.shape.vocab_size, self.loader)
        try:
            for _ in range(WARM_UP_STEPS):
                self.step(0.0)
        finally:
            self.hooks, self.loader, self.step_index = hooks, loader, 0
        self.optimizers.reset()
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(start[name])
        synchronize(self.device)

    def final_weights(self) -> dict[str, Tensor]:
        """What is exported: the model's state dict, mapped by every technique that acts at the end."""
        weights: Mapping[str, Tensor] = {n: t.detach() for n, t in self.model.state_dict().items()}
        for hook in self.hooks:
            weights = hook.weights_end(weights)
        return dict(weights)

    def control_names(self) -> list[str]:
        """Parameters whose role asks for full precision in the artifact."""
        return [name for name, role in self.model.roles().items() if role.export == "control"]

    def training_state(self) -> dict[str, Any]:
        """Everything a checkpoint needs to go on exactly: weights, optimizers, techniques, data, random state."""
        state: dict[str, Any] = {
            "step": self.step_index,
            "weights": {n: t.detach().clone() for n, t in self.model.state_dict().items()},
            "optimizers": self.optimizers.state(),
            "hooks": [h.state() for h in self.hooks],
            "loader": self.loader.state(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`training_state` of an equal run gave."""
        self.step_index = int(state["step"])
        self.model.load_state_dict(state["weights"])
        self.optimizers.load_state(state["optimizers"])
        for hook, kept in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state(kept)
        self.loader.load_state(state["loader"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)


class _Noise:
    """Random tokens in the shape of the real batches."""

    def __init__(self, tokens: int, vocab: int, like: Loader) -> None:
        self._tokens, self._vocab, self._like = tokens, vocab, like
        self._random = np.random.default_rng(0)
        self._state = like.state()

    def next(self) -> Batch:
        x, y = self._like.next()
        self._like.load_state(self._state)
        return self._random.integers(0, self._vocab, x.shape), self._random.integers(0, self._vocab, y.shape)

    def state(self) -> dict[str, Any]:
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        self._state = state


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Log:
    """Losses and times as they come in; reads the device only every ``every`` steps.

    A step's cost is wall time on an accelerator. On a CPU it is this process's CPU time: runs share the
    cores with each other and with whatever else the machine does, and waiting for a core is not a cost of the code.
    """

    def __init__(self, events: EventStream, every: int, device: torch.device) -> None:
        self.losses: list[float] = []
        self.step_s: list[float] = []
        self._events, self._every = events, max(every, 1)
        self._waiting: list[Tensor] = []
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter
        self._since = self._clock()

    def resume(self) -> None:
        """Go on after a pause that is not a step's."""
        self._since = self._clock()

    def add(self, trainer: Trainer, loss: Tensor, last: bool, began: float) -> None:
        """Take in one step's loss. Raises RunFailed("nan") naming the first step that was not finite."""
        self._waiting.append(loss)
        done = trainer.step_index
        if done % self._every and not last:
            return
        values = torch.stack(self._waiting).tolist()
        now, elapsed = self._clock(), time.perf_counter() - began
        self.step_s += [(now - self._since) / len(values)] * len(values)
        self._since, self._waiting = now, []
        for step, value in enumerate(values, start=done - len(values) + 1):
            if not np.isfinite(value):
                raise RunFailed("nan", f"training loss is {value} at step {step} of {trainer.steps}")
        self.losses += values
        self._events.emit(
            "step", step=done, of=trainer.steps, train_loss=values[-1], lr_scale=trainer.lr_scale,
            tokens=done * trainer.batch_tokens, elapsed_s=elapsed,
        )


class DevSlice:
    """The dev slice (cut from train), scored by the model as it stands: tells a hopeless run early.

    Says nothing of the artifact, and is this process's own word: good enough to give a run up, never to praise it.
    """

    def __init__(self, spec: RunSpec, seq_len: int, device: torch.device) -> None:
        """Raises DataError when the data folder has no dev split."""
        from trainer.data.loader import eval_tokens

        stream = torch.from_numpy(eval_tokens(Path(spec.data_dir), "dev", spec.dev_tokens, seq_len).astype(np.int64))
        self._x = stream[:-1].reshape(-1, seq_len).to(device)
        self._y = stream[1:].reshape(-1, seq_len).to(device)
        self.tokens, self.seq_len = self._y.numel(), seq_len

    @torch.no_grad()
    def loss(self, model: GPT, batch_seqs: int) -> float:
        """Mean nats/token. Draws no random number and touches no state."""
        total = 0.0
        for x, y in zip(self._x.split(batch_seqs), self._y.split(batch_seqs), strict=True):
            total += float(model(x, y)) * y.numel()
        return total / self.tokens


def train_loop(
    trainer: Trainer, events: EventStream, log_every: int, dev: DevSlice | None = None, dev_every: int = 0
) -> tuple[list[float], list[float], float]:
    """Steps until the budget is used. Returns loss and cost (seconds) of every step, and the time they took.

    With ``dev``, its loss is reported after every ``dev_every`` steps but the last; that time is no one's cost.
    """
    synchronize(trainer.device)
    log = _Log(events, log_every, trainer.device)
    began = time.perf_counter()
    while True:
        loss = trainer.step(time.perf_counter() - began)
        out_of_time = 0 < trainer.limit_s <= time.perf_counter() - began
        last = out_of_time or trainer.step_index >= trainer.steps
        log.add(trainer, loss, last, began)
        if last:
            return log.losses, log.step_s, time.perf_counter() - began
        if dev and trainer.step_index % dev_every == 0:
            pause = time.perf_counter()
            value = dev.loss(trainer.model, max(1, trainer.batch_tokens // dev.seq_len))
            if np.isfinite(value):  # a run that is not finite is caught by its training loss
                events.emit("dev", step=trainer.step_index, dev_loss=value, tokens=dev.tokens)
            log.resume()
            began += time.perf_counter() - pause


def check_spec(spec: RunSpec) -> dict[str, KnobValue]:
    """The spec's knobs, resolved. Raises ContractError or KnobError for what the types let through."""
    if not 0 <= spec.seed < 2**63:
        raise ContractError(f"RunSpec.seed = {spec.seed}: expected 0 <= seed < 2**63")
    if spec.log_every < 1:
        raise ContractError(f"RunSpec.log_every = {spec.log_every}: expected a whole number >= 1")
    for name, value in (("dev_every", spec.dev_every), ("dev_tokens", spec.dev_tokens)):
        if value < 0:
            raise ContractError(f"RunSpec.{name} = {value}: expected a whole number >= 0")
    return REGISTRY.resolve(spec.knobs)


def run(spec: RunSpec, events: EventStream, started: float) -> RunResult:
    """Train, export and report one run. ``started``: ``time.perf_counter()`` at the start of the process.

    Raises ContractError, KnobError (the spec), DataError (the data folder), RunFailed, and whatever a
    defect raises.
    """
    from trainer.data.loader import TrainLoader
    from trainer.export import ExportError, NonFiniteTensorError, export_model
    from trainer.export.codesize import code_bytes
    from trainer.tree import package_root, tree_hash

    knobs = check_spec(spec)
    device = configure(spec)
    tree = tree_hash()
    with torch.device("meta"):
        params = build_model(knobs).num_params()
    events.emit(
        "started", trainer_path=str(package_root()), tree_hash=tree, torch=torch.__version__,
        device=device_name(device), params=params, steps=int(knobs["iterations"]),
    )
    events.emit("phase", name="data")
    loader = TrainLoader(
        Path(spec.data_dir), int(knobs["train_batch_tokens"]), int(knobs["train_seq_len"]), spec.seed,
        "shuffled" if knobs["loader"] == "shuffled" else "sequential",
    )
    trainer = Trainer(knobs, spec.seed, loader, device, spec.compile)
    if device.type == "cuda" or spec.compile:
        events.emit("phase", name="compile")
        trainer.warm_up()
    events.emit("phase", name="train")
    dev = DevSlice(spec, int(knobs["train_seq_len"]), device) if spec.dev_every else None
    setup_s = time.perf_counter() - started
    losses, step_s, train_s = train_loop(trainer, events, spec.log_every, dev, spec.dev_every)
    events.emit("phase", name="export")
    began = time.perf_counter()
    path = Path(spec.out_dir) / ARTIFACT_FILE
    try:
        info = export_model(trainer.final_weights(), knobs, path, trainer.control_names())
    except NonFiniteTensorError as e:
        raise RunFailed("nan", f"after step {trainer.step_index}: {e}") from e
    except (ExportError, OSError) as e:
        raise RunFailed("export", str(e)) from e
    tail = losses[-max(1, round(len(losses) * TAIL)):]
    return RunResult(
        run_id=spec.run_id, seed=spec.seed, steps=trainer.step_index,
        tokens=trainer.step_index * trainer.batch_tokens, params=params,
        train_seconds=train_s, setup_seconds=setup_s, export_seconds=time.perf_counter() - began,
        step_ms=1e3 * statistics.median(step_s), final_train_loss=sum(tail) / len(tail),
        artifact_path=str(path), artifact_bytes=info.bytes, artifact_sha256=info.sha256,
        payload_bytes=info.payload_bytes, code_bytes=code_bytes(knobs), peak_memory_bytes=peak_memory(device),
        tree_hash=tree, torch_version=torch.__version__, device_name=device_name(device),
    )
