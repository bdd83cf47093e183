"""The process around a run: device, threads, determinism, clocks, memory, and the event stream."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from trainer.contract import EVENT_KINDS, ContractError, FailureKind, RunSpec


class RunFailed(RuntimeError):
    """A run that cannot go on, with the kind of failure that its result file will name."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


class EventStream:
    """Writes events to a new file, one JSON line each, flushed at once (``contract.EVENT_KINDS``)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def emit(self, kind: str, **fields: Any) -> None:
        """Write one event. A non-finite number would not be JSON: ValueError."""
        assert kind in EVENT_KINDS, kind
        line = json.dumps({"t": time.time(), "kind": kind, **fields}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def configure(spec: RunSpec) -> torch.device:
    """Set the process up for ``spec`` and return its device. ContractError when the device is not there."""
    device = _device(spec.device)
    if spec.threads < 1:
        raise ContractError(f"RunSpec.threads = {spec.threads}: expected a whole number >= 1")
    torch.set_num_threads(spec.threads)
    seed_process(spec.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32, as the challenge does
        # Flash attention, as the challenge; plain products remain for head widths that it does not take.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    else:
        keep_freed_memory()
        fast_exact_matmul()
    # cuBLAS reads this when it starts: without a fixed workspace its results may differ between runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(spec.deterministic)
    # A debugging aid that would cost a pass over all new memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return device


def _device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise ContractError(f"RunSpec.device = {name!r}: expected cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= found:
        raise ContractError(f"RunSpec.device = {name!r}: this machine offers {found} CUDA device(s) to torch "
                            f"{torch.__version__}; use cpu, or mend the driver")
    return torch.device("cuda", int(index or 0))


def seed_process(seed: int) -> None:
    """Seed the global generators, for whatever draws from them. Parameters do not: see ``model/init.py``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Tell glibc to keep the heap it has. Does nothing where there is no glibc.

    By default it hands the large blocks of every step back to the kernel and faults them in again at the
    next: some 10,000 page faults a step at the pocket shape, up to half the step's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_* of malloc.h
    libc.mallopt(mmap_threshold, 32 << 20)  # the largest value that glibc accepts
    libc.mallopt(trim_threshold, 1 << 30)
    libc.mallopt(top_pad, 64 << 20)


def fast_exact_matmul() -> bool:
    """Let CPU products in fp32 run in oneDNN, if that computes them in fp32. True if it does.

    torch sends fp32 products to MKL, which uses AVX2 on AMD; oneDNN's AVX-512 kernels are 2.3 times faster
    there. The way in is the setting that *allows* bf16 inside. With the instruction set held to plain
    AVX-512 oneDNN has no bf16 kernel to choose, and a trial product says whether that is so.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    matmul.fp32_precision = "bf16"
    if not _products_are_fp32():
        matmul.fp32_precision = "ieee"
        return False
    return True


def _products_are_fp32() -> bool:
    """Whether 2-D and batched products keep fp32's precision (bf16 would be off by about 0.1 here)."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((128, 256), (4, 128, 256)):
        x = torch.randn(shape, generator=generator)
        exact = x.double() @ x.double().mT
        if float((x @ x.mT - exact).abs().max()) > 1e-3:
            return False
    return True


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the largest resident set of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out. torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
