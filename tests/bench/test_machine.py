import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from manylora.bench import machine
from manylora.bench.machine import LoadWatch, describe_machine, describe_revision, refuse_if_busy
from manylora.errors import ConfigError

BURN = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"


def test_a_quiet_machine_is_used(monkeypatch):
    monkeypatch.setattr(machine, "foreign_cores", lambda _: {(1, "init"): 0.01, (2, "shell"): 0.05})
    refuse_if_busy()


def test_a_busy_machine_is_refused_and_the_processes_named(monkeypatch):
    monkeypatch.setattr(machine, "foreign_cores", lambda _: {(1, "init"): 0.0, (77, "compiler"): 0.9})
    with pytest.raises(ConfigError, match=r"0\.90 cores \(compiler \(pid 77\): 0\.90.*--force"):
        refuse_if_busy()


def test_many_small_loads_add_up(monkeypatch):
    monkeypatch.setattr(machine, "foreign_cores", lambda _: {(pid, "worker"): 0.05 for pid in range(10)})
    with pytest.raises(ConfigError, match=r"0\.50 cores"):
        refuse_if_busy()


def test_work_that_ends_within_seconds_is_waited_for(monkeypatch):
    samples = iter([0.4, 0.3, 0.1])
    monkeypatch.setattr(machine, "foreign_cores", lambda _: {(9, "kworker"): next(samples)})
    refuse_if_busy()
    assert list(samples) == []


def test_the_wait_ends(monkeypatch):
    samples = iter([0.4, 0.3, 0.1])
    monkeypatch.setattr(machine, "foreign_cores", lambda _: {(9, "kworker"): next(samples)})
    with pytest.raises(ConfigError, match=r"0\.30 cores"):
        refuse_if_busy(max_samples=2)


def test_strangers_at_work_are_seen_and_children_are_not():
    # The shell ends at once, so that what it started is nobody's child but init's.
    started = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" >/dev/null 2>&1 & echo $!', sys.executable, BURN],
        capture_output=True,
        text=True,
        check=True,
    )
    stranger = int(started.stdout)
    child = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        used = {pid: cores for (pid, _), cores in machine.foreign_cores(0.5).items()}
        assert used[stranger] > 0.05
        assert child.pid not in used
        assert os.getpid() not in used
    finally:
        os.kill(stranger, signal.SIGKILL)
        child.kill()
        child.wait()


def test_the_load_watch_leaves_out_our_own_work(monkeypatch):
    now, system, own = [0.0], [(50.0, 1.0)], [7.0]
    monkeypatch.setattr("manylora.bench.machine.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(machine, "_system_cpu_s", lambda: system[0])
    monkeypatch.setattr(machine, "_own_cpu_s", lambda: own[0])
    watch = LoadWatch()
    now[0], system[0], own[0] = 10.0, (68.0, 1.5), 22.0  # 18 s of all processors, 15 s of them ours
    load = watch.stop()
    assert load.other_cores == 0.3
    assert load.steal_cores == 0.05


def test_the_load_watch_reads_this_machine():
    watch = LoadWatch()
    time.sleep(0.1)
    load = watch.stop()
    assert 0 <= load.other_cores <= 1.1 * (os.cpu_count() or 1)


def test_what_is_said_of_this_machine():
    here = describe_machine()
    assert here.cores == len(os.sched_getaffinity(0))
    assert here.memory_bytes > 1 << 28
    assert here.cpu
    assert here.torch.startswith("2.")


@pytest.mark.parametrize(
    ("cpu", "cores", "instruction_sets", "slug"),
    [
        ("AMD EPYC 9R14 96-Core Processor", 2, ("avx2", "avx512f"), "2-core-amd-epyc-9r14-avx512"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", 16, ("avx2",), "16-core-intel-xeon-avx2"),
    ],
)
def test_the_slug_is_fit_for_a_file_name(cpu, cores, instruction_sets, slug):
    here = replace(describe_machine(), cpu=cpu, cores=cores, instruction_sets=instruction_sets)
    assert here.slug == slug


def test_the_revision_is_that_of_this_repository():
    revision = describe_revision()
    assert revision.root is not None
    assert (revision.root / "pyproject.toml").exists()
    assert re.fullmatch(r"[0-9a-f]{7,}", revision.commit)
