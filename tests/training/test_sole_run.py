import os
import signal
import subprocess
import sys

import pytest

from manylora.errors import ConfigError
from manylora.training.sole_run import sole_run

KILLED = """
import os, signal, sys
from pathlib import Path
from manylora.training.sole_run import sole_run

with sole_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_the_folder_is_refused_and_one_elsewhere_is_not(tmp_path):
    folder = tmp_path / "runs" / "lcm"
    with sole_run(folder):
        with pytest.raises(ConfigError, match=rf"another run uses {folder}.*name"), sole_run(folder):
            pass
        with sole_run(tmp_path / "runs" / "other"):
            pass
    with sole_run(folder):
        pass


def test_a_killed_run_lets_go(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another run uses"), sole_run(tmp_path):
            pass
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    with sole_run(tmp_path):
        pass


def test_where_there_are_no_locks_the_run_goes_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with sole_run(tmp_path), sole_run(tmp_path):
        pass
