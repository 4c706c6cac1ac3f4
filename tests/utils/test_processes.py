"""Processes that end with those they belong to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tokenbridge.utils.files import _start_of

RANK = """
import sys, time
from datetime import timedelta
from tokenbridge.utils import processes
processes.SILENCE, processes._PERIOD, processes.MEETING = 3.0, 0.2, timedelta(seconds=float(sys.argv[1]))
from tokenbridge.cli import main
def work():
    state = processes.process_state()
    print("met", flush=True)
    exec(sys.argv[2])
main._call_subcommand = work
main.main()
"""


def ranks(work: str, *, numbers: tuple[int, ...] = (0, 1), meeting: float = 40.0) -> list[subprocess.Popen[str]]:
    """Start processes of a launch of two, as a scheduler does that watches nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(meeting), work],
            env={**os.environ, **launch, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]


def test_a_lost_process_ends_the_others() -> None:
    """Even the one that the others meet at, and though they do not wait for it at the moment."""
    lost, other = launched = ranks("time.sleep(60)")
    for process in launched:
        assert process.stdout is not None
        assert process.stdout.readline() == "met\n"
    lost.kill()
    lost.communicate()
    _, err = other.communicate(timeout=30)
    assert other.returncode == 2
    assert "Process 0 of this run is lost, so process 1 ends too" in err


def test_a_process_that_does_not_come_is_not_waited_for() -> None:
    (process,) = ranks("", numbers=(0,), meeting=1.0)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Another process of this run has ended, or did not come" in err) == (2, True), err


def test_processes_end_one_after_another_without_a_word() -> None:
    """One that has ended is not lost, however long the main one goes on."""
    launched = ranks("state.wait_for_everyone(); time.sleep(5 if state.is_main_process else 0)")
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in launched] == [("", 0)] * 2


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    parent = f"""
import subprocess, sys
from tokenbridge.utils.parent import environment_of_child
child = "from tokenbridge.utils.parent import end_with_parent; import time; end_with_parent(); print(1); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], env=environment_of_child(), stderr=subprocess.PIPE)
open({str(tmp_path / "pid")!r}, "w").write(str(process.pid))
print("started", flush=True)
process.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    child = int((tmp_path / "pid").read_text())
    time.sleep(0.5)
    os.kill(child, 0)
    process.kill()
    process.communicate(timeout=30)  # the child has the pipe too, and closes it by ending
    for _ in range(100):
        if _start_of(child) is not None:
            time.sleep(0.1)
    assert _start_of(child) is None
