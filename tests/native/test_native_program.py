"""The kernels without Python, under AddressSanitizer and UndefinedBehaviorSanitizer: tests/native/*.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from manylora.kernels import native
from manylora.kernels.native import tiles

ROOT = Path(__file__).parents[2]
ROUNDS, SEED = 40, 1
STRAY = 99  # what the sanitizer ends with
KERNELS = (
    "shrink",
    "expand",
    "lora",
    "attend",
    "rotate",
    "write_kv",
    "add_rms_norm",
    "silu_mul",
    "argmax",
    "place_rows",
    "round_rows",
    "int8_product",
    pytest.param(
        "tile_product",
        marks=pytest.mark.skipif(not tiles.is_available(), reason="this processor has no tiles"),
    ),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "c++")
    for tool in ("cmake", compiler):
        if shutil.which(tool) is None:
            pytest.skip(
                f"there is no {tool} here; the test program of the kernels needs cmake and a C++ compiler"
            )
    build = tmp_path_factory.mktemp("native_tests")
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-DMANYLORA_NATIVE_TESTS=ON",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    ]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "cannot find -lasan" in done.stderr or "libclang_rt.asan" in done.stderr:
            pytest.skip(f"{compiler} comes without its sanitizers here")
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "manylora_native_tests"


def run(program: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # The kernels keep scratch for each thread, and threads of OpenMP outlive main: no leaks of theirs.
    variables = {
        **os.environ,
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={STRAY}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",  # three threads on two cores must not spin for one another
    }
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=variables)


@pytest.mark.timeout(1200)  # the build alone takes a minute
def test_no_stray_access_no_undefined_behaviour_and_the_right_sums(program):
    done = run(program, str(ROUNDS), str(SEED))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "0 failures"
    tested = {line.split(":")[0] for line in done.stdout.splitlines() if "rounds" in line}
    if native.AVAILABLE:
        assert tested == set(native._core.isas())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_does_nothing_is_found(program, kernel):
    done = run(program, "without", kernel)
    assert done.returncode == 1, done.stdout + done.stderr[-4000:]
    assert f"{kernel} " in done.stdout


def test_a_stray_read_ends_the_program(program):
    done = run(program, "stray")
    assert done.returncode == STRAY
    assert "heap-buffer-overflow" in done.stderr
