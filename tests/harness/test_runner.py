"""Supervision: each way for a process to end is really caused here, and told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import harness.runner as runner
from harness.runner import child_env, kill_orphans, run_process
from trainer.contract import EVENTS_FILE


def start(folder: Path, code: str, **limits: Any) -> Any:
    """Run Python code under supervision with short limits."""
    options: dict[str, Any] = {
        "timeout_s": 20, "hang_s": 20, "memory_bytes": 2 * 10**9, "stop": threading.Event(), "on_event": None, **limits,
    }
    return run_process([sys.executable, "-c", code], cwd=folder, env=child_env(folder, 1, folder), **options)


def test_a_normal_end_with_its_output_and_events(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    code = ("import json,sys; f=open('events.jsonl','a'); print('hello'); "
            "[print(json.dumps({'kind':'step','step':i}),file=f,flush=True) for i in range(3)]; "
            "print('{torn',file=f,end=''); f.flush(); sys.exit(3)")
    done = start(tmp_path, code, on_event=events.append)
    assert (done.ended, done.returncode, done.log_tail) == ("exit", 3, "hello\n")
    assert [e["step"] for e in events] == [0, 1, 2]


def test_a_time_out_ends_the_whole_group(tmp_path: Path) -> None:
    code = ("import subprocess,sys,time; p=subprocess.Popen([sys.executable,'-c','import time; time.sleep(60)']); "
            "print(p.pid,flush=True); time.sleep(60)")
    done = start(tmp_path, code, timeout_s=1.5)
    assert done.ended == "timeout"
    child = int(done.log_tail.split()[0])
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild survived its group")


def test_silence_is_a_hang_and_a_heartbeat_is_not(tmp_path: Path) -> None:
    beat = ("import time\nfor i in range(12):\n"
            "    open('events.jsonl','a').write('{\"kind\":\"step\"}\\n'); time.sleep(0.2)\n")
    assert start(tmp_path, beat, hang_s=1.2).ended == "exit"
    assert start(tmp_path, "import time; time.sleep(30)", hang_s=1.0).ended == "hang"


def test_memory_over_the_limit_is_seen(tmp_path: Path) -> None:
    code = "import time; x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096]); time.sleep(30)"
    assert start(tmp_path, code, memory_bytes=150_000_000).ended == "memory"


def test_endless_output_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOG_LIMIT_BYTES", 1_000_000)
    done = start(tmp_path, "while True: print('x' * 1000)")
    assert done.ended == "log"


def test_a_stop_ends_it_now(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    assert start(tmp_path, "import time; time.sleep(30)", stop=stop).ended == "stopped"


def test_the_environment_is_scrubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    done = start(tmp_path, "import os, json; print(json.dumps(dict(os.environ)))")
    env = json.loads(done.log_tail)
    assert "secret" not in done.log_tail
    assert env["OMP_NUM_THREADS"] == "1" and env["PYTHONPATH"] == str(tmp_path)


def test_orphans_of_a_killed_loop_are_ended_and_strangers_are_not(tmp_path: Path) -> None:
    mine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        for name, pid, started in (("a", mine.pid, psutil.Process(mine.pid).create_time()),
                                   ("b", other.pid, 12345.0), ("c", 2**22 + 5, 1.0)):
            folder = tmp_path / name
            folder.mkdir()
            (folder / runner.PID_FILE).write_text(json.dumps({"pid": pid, "started": started}))
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / runner.PID_FILE).write_text("torn")
        assert kill_orphans(tmp_path) == ["a"]
        assert mine.wait(5) == -9
        assert other.poll() is None
        assert not list(tmp_path.glob(f"*/{runner.PID_FILE}"))
    finally:
        for p in (mine, other):
            if p.poll() is None:
                os.killpg(p.pid, 9)
            p.wait()


def test_events_written_before_this_process_are_not_read_again(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).write_text('{"kind": "old"}\n')
    events: list[dict[str, Any]] = []
    start(tmp_path, "open('events.jsonl','a').write('{\"kind\": \"new\"}\\n')", on_event=events.append)
    assert [e["kind"] for e in events] == ["new"]


def test_a_run_is_given_up_when_its_watch_says_so(tmp_path: Path) -> None:
    seen: list[Any] = []

    def watch(event: dict[str, Any]) -> str:
        seen.append(event.get("step"))
        return "hopeless" if event.get("step") == 3 else ""

    code = ("import json,time\nfor i in range(600):\n"
            "    open('events.jsonl','a').write(json.dumps({'kind': 'dev', 'step': i}) + '\\n'); time.sleep(0.05)\n")
    done = start(tmp_path, code, watch=watch)
    assert (done.ended, done.why) == ("given-up", "hopeless")
    assert 3 in seen and 599 not in seen
