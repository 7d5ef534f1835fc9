"""Signals that stop a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals for another process")

WAITING = """
import signal, sys, time
from moondream_cv.cli.signals import Terminated, exit_status, stop_on_signals
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
stop_on_signals()
try:
    print("ready", flush=True)
    for _ in range(4800):  # Python does not handle a signal that arrives just before a single long sleep begins
        time.sleep(0.05)
except KeyboardInterrupt as error:
    print(error, flush=True)
    sys.exit(exit_status(error))
"""

COMMAND = """
import sys, time
import moondream_cv.cli.detect as detect
def run_detect_command(*arguments, **options):
    print("ready", flush=True)
    for _ in range(4800):
        time.sleep(0.05)
detect.run_detect_command = run_detect_command
sys.argv = ["moondream-cv", "detect", "a.png", "-c", "dog"]
from moondream_cv.cli import main
main()
"""


BLOCKED = """
import hashlib
from moondream_cv.cli.signals import exit_on_interrupt, stop_on_signals
stop_on_signals()
with exit_on_interrupt():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # runs for minutes without handling signals
"""


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_raise_keyboard_interrupt(name: str, status: int) -> None:
    process = started(WAITING, "SIG_DFL")
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == status, stderr
    assert stdout.strip() == ("" if name == "SIGINT" else f"stopped by {name}")


def test_sighup_is_ignored_under_nohup() -> None:
    process = started(WAITING, "SIG_IGN")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=240)[0].strip() == "stopped by SIGTERM"


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_commands_exit_with_the_status_of_the_signal(name: str, status: int) -> None:
    process = started(COMMAND)
    process.send_signal(getattr(signal, name))
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == status, stderr
    assert stderr == ("Interrupted\n" if name == "SIGINT" else "")


def test_ctrl_c_ends_a_long_call_of_a_library() -> None:
    process = started(BLOCKED)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=240)[1] == "Interrupted\n"
    assert process.returncode == 130


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or sys.platform != "linux",
    reason="needs root on Linux for process 1 of a PID namespace",
)
def test_process_1_of_a_container_stops_on_sigterm(tmp_path: Path) -> None:
    namespace = ["unshare", "--pid", "--fork", "--kill-child", "--"]
    try:
        subprocess.run([*namespace, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no PID namespace is available: {error}")
    code = "import os\nassert os.getpid() == 1\n" + WAITING
    process = subprocess.Popen(
        [*namespace, sys.executable, "-c", code, "SIG_DFL"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert process.communicate(timeout=240)[0].strip() == "stopped by SIGTERM"
