"""One supervised subprocess: own process group, heartbeat from its event stream, time-out, memory, exit class.

Nothing here knows what the process computes. A run that dies is classified by what can be seen from
outside (its own Failure file first, then signal, exit code, silence), never by believing its words.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from trainer.contract import EVENTS_FILE, LOG_FILE

PID_FILE = "pid.json"
POLL_S = 0.1
LOG_LIMIT_BYTES = 20_000_000  # a run that writes more is stopped: endless output fills disks
KEEP_ENV = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "SYSTEMROOT")


@dataclass(frozen=True, kw_only=True)
class ProcessOutcome:
    """How a process ended. ``ended``: exit | timeout | hang | memory | log | stopped | given-up (``why`` says)."""

    ended: str
    returncode: int
    wall_seconds: float
    log_tail: str
    why: str = ""


def child_env(code_root: Path, threads: int, home: Path) -> dict[str, str]:
    """A scrubbed environment: no keys, no user settings; imports come from ``code_root`` alone."""
    env = {k: os.environ[k] for k in KEEP_ENV if k in os.environ}
    env.update(
        PYTHONPATH=str(code_root), PYTHONDONTWRITEBYTECODE="1", PYTHONHASHSEED="0", PYTHONNOUSERSITE="1",
        PYTHONUNBUFFERED="1", HOME=str(home), TMPDIR=str(home),
        OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads),
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
    )
    return env


def run_process(
    argv: list[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float, hang_s: float, memory_bytes: int,
    stop: threading.Event, on_event: Callable[[dict[str, Any]], None] | None = None,
    watch: Callable[[dict[str, Any]], str] | None = None,
) -> ProcessOutcome:
    """Run to its end, or end it. ``cwd`` is the run folder; output goes to its log, events are followed there.

    ``watch`` sees every event too; when it answers with a reason, the run is given up.
    Raises OSError when the process cannot be started at all (infrastructure).
    """
    begin = time.monotonic()
    log_path = cwd / LOG_FILE
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            argv, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _write_pid(cwd, process.pid)
    reasons: list[str] = []

    def seen(event: dict[str, Any]) -> None:
        if on_event:
            on_event(event)
        if watch and (why := watch(event)):
            reasons.append(why)

    follower = _Follower(cwd / EVENTS_FILE, seen)
    ended, last_sign, last_memory = "exit", begin, 0.0
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            now = time.monotonic()
            if follower.poll():
                last_sign = now
            if stop.is_set():
                ended = "stopped"
            elif reasons:
                ended = "given-up"
            elif now - begin > timeout_s:
                ended = "timeout"
            elif now - last_sign > hang_s:
                ended = "hang"
            elif now - last_memory > 1.0:
                last_memory = now
                if _resident(process.pid) > memory_bytes:
                    ended = "memory"
                elif log_path.stat().st_size > LOG_LIMIT_BYTES:
                    ended = "log"
            if ended != "exit":
                break
    finally:
        kill_group(process.pid)
        process.wait()
        (cwd / PID_FILE).unlink(missing_ok=True)
    follower.poll()
    return ProcessOutcome(ended=ended, returncode=process.returncode, wall_seconds=time.monotonic() - begin,
                          log_tail=tail(log_path), why=reasons[0] if reasons else "")


class _Follower:
    """Reads whole new lines of an event stream; a half-written line waits, nonsense is ignored."""

    def __init__(self, path: Path, sink: Callable[[dict[str, Any]], None] | None) -> None:
        self._path, self._sink = path, sink
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def poll(self) -> bool:
        """Pass new events on; True when anything was written since the last call."""
        try:
            with self._path.open("rb") as f:
                f.seek(self._offset)
                data = f.read(1_000_000)
        except FileNotFoundError:
            return False
        if not data:
            return False
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if self._sink and isinstance(event, dict):
                    self._sink(event)
        return True


def tail(path: Path, limit: int = 4000) -> str:
    """The last ``limit`` characters of a log, decoded leniently."""
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - limit))
            return f.read(limit).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _resident(pid: int) -> int:
    """Resident bytes of a process and its descendants."""
    total = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for p in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += p.memory_info().rss
    return total


def kill_group(pid: int) -> None:
    """SIGKILL a whole process group; silent when it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _write_pid(folder: Path, pid: int) -> None:
    started = 0.0
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(pid).create_time()
    (folder / PID_FILE).write_text(json.dumps({"pid": pid, "started": started}), encoding="utf-8")


def kill_orphans(runs: Path) -> list[str]:
    """End runs that a killed loop left behind; returns their folders. Call it only while no loop runs them.

    Known by their pid file (same pid *and* same start time), or, if the kill came before that was written,
    by their working folder.
    """
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            cwd = Path(process.cwd())
            if cwd.parent == runs.resolve() and process.pid != os.getpid():
                kill_group(os.getpgid(process.pid))
                killed.append(cwd.name)
    for path in runs.glob(f"*/{PID_FILE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            data = json.loads(path.read_text(encoding="utf-8"))
            if abs(psutil.Process(data["pid"]).create_time() - data["started"]) < 0.05:
                kill_group(data["pid"])
                killed.append(path.parent.name)
        path.unlink(missing_ok=True)
    return killed
