"""Break the distillation on purpose, one fault at a time, and see which tests notice: mutation -> failing tests.

python scripts/mutate_distill.py [--oracles] [--only WORDS]      exit status 1 if a mutation survives

Works on a copy of the sources, so that a killed run leaves nothing broken behind. Without --oracles only the fast
tests run; with it also those that distil.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAST = [
    "tests/distill/test_objective.py",
    "tests/distill/test_phased.py",
    "tests/diffusion",
    "tests/distill/test_learners.py",
]
ORACLES = ["tests/distill/test_mixtures.py", "tests/distill/test_gaussian.py"]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    """Below src/manylora."""
    right: str
    """Occurs exactly once in the file."""
    wrong: str


MUTATIONS = [
    Mutation(
        "sign of guidance",
        "diffusion/guidance.py",
        "conditional.x0 + w * (conditional.x0 - unconditional.x0)",
        "conditional.x0 - w * (conditional.x0 - unconditional.x0)",
    ),
    Mutation(
        "sign of guidance, of epsilon",
        "diffusion/guidance.py",
        "conditional.epsilon + w * (conditional.epsilon - unconditional.epsilon)",
        "conditional.epsilon - w * (conditional.epsilon - unconditional.epsilon)",
    ),
    Mutation(
        "conditional and unconditional exchanged",
        "distill/objective.py",
        "conditional, unconditional = (",
        "unconditional, conditional = (",
    ),
    Mutation(
        "w for w + 1", "diffusion/guidance.py", "return guidance_scale - 1.0", "return guidance_scale"
    ),
    Mutation("k one too long", "diffusion/timesteps.py", "max(start - k, 0)", "max(start - k - 1, 0)"),
    Mutation("k one too short", "diffusion/timesteps.py", "max(start - k, 0)", "max(start - k + 1, 0)"),
    Mutation(
        "wrong previous alpha_bar: that of the start",
        "distill/objective.py",
        "self.schedule.level(t, z), self.schedule.level(t_landing, z)",
        "self.schedule.level(t, z), self.schedule.level(t, z)",
    ),
    Mutation(
        "wrong previous alpha_bar: 1 at the end of the way",
        "distill/objective.py",
        "level, to = self.schedule.level(t, z), self.schedule.level(t_landing, z)",
        "level, to = self.schedule.level(t, z), self.schedule.level(t_landing, z)\n"
        "        last = by_row(t_landing == 0, z)\n"
        "        to = NoiseLevel(to.signal.masked_fill(last, 1.0), to.sigma.masked_fill(last, 0.0))",
    ),
    Mutation(
        "target of the start, not of the landing",
        "distill/objective.py",
        "landed = self._end(target_student, z_landing, t_landing, condition, draw.w)",
        "landed = self._end(target_student, z_landing, t, condition, draw.w)",
    ),
    Mutation(
        "missing stop-gradient",
        "distill/objective.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ),
    Mutation(
        "the student where its average was named",
        "distill/objective.py",
        "self._end(target_student, z_landing",
        "self._end(student, z_landing",
    ),
    Mutation(
        "no boundary condition",
        "diffusion/consistency.py",
        "return c_skip * z + c_out * x0",
        "return x0",
    ),
    Mutation(
        "alpha lost in saving",
        "distill/learners.py",
        "scaling: float = layer.scaling[MAIN]",
        "scaling = 1.0",
    ),
    Mutation(
        "the teacher with the LoRA on",
        "distill/learners.py",
        "self._enable(False)",
        "self._enable(True)",
    ),
    Mutation(
        "the LoRA off after the teacher",
        "distill/learners.py",
        "            self._enable(True)",
        "            self._enable(False)",
    ),
    Mutation(
        "conditional and unconditional exchanged, in the one pass",
        "models/diffusion_base.py",
        "Condition.cat([condition, unconditional])",
        "Condition.cat([unconditional, condition])",
    ),
    Mutation(
        "guidance adapter turned round",
        "distill/learners.py",
        "(2 * w - low - high)",
        "(low + high - 2 * w)",
    ),
    Mutation(
        "phased: a jump ends a phase too early",
        "distill/phased.py",
        "self.landing_t[first]",
        "self.landing_t[(first - self.steps_of_a_phase).clamp(min=0)]",
    ),
    Mutation(
        "phased: the walk leaves its phase",
        "distill/phased.py",
        "index % self.steps_of_a_phase + 1",
        "index + 1",
    ),
    Mutation(
        "phased: who has arrived walks on",
        "distill/phased.py",
        "z = torch.where(by_row(is_on, z), stepped, z)",
        "z = stepped",
    ),
    Mutation(
        "phased: all walk from the middle of a phase",
        "distill/phased.py",
        "phase * self.steps_of_a_phase + self.steps_of_a_phase - 1",
        "phase * self.steps_of_a_phase + self.steps_of_a_phase // 2",
    ),
    Mutation(
        "phased: missing stop-gradient",
        "distill/phased.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
    ),
    Mutation(
        "phased: the student where its average was named",
        "distill/phased.py",
        "self._jump(target_student, z_stop",
        "self._jump(student, z_stop",
    ),
    Mutation(
        "phased: distances in z, not in z / signal",
        "distill/phased.py",
        "self._distance(found / signal, z_stop / signal)",
        "self._distance(found, z_stop)",
    ),
]


def failing_tests(copy: Path, tests: list[str]) -> list[str]:
    """The tests that fail on the copy, by their ids."""
    # The copy holds no compiled kernels: it computes in torch, and says so.
    quiet = ("-W", "ignore:manylora's native kernels:RuntimeWarning")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", *quiet, *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        sys.exit(f"pytest did not run:\n{done.stdout}\n{done.stderr}")
    lines = done.stdout.splitlines()
    return [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]


def apply(mutation: Mutation, copy: Path) -> None:
    path = copy / "manylora" / mutation.file
    source = path.read_text()
    if source.count(mutation.right) != 1:
        sys.exit(
            f"{mutation.name}: {mutation.file} holds {source.count(mutation.right)} times {mutation.right!r}"
        )
    path.write_text(source.replace(mutation.right, mutation.wrong))


def fresh_copy(folder: Path) -> Path:
    shutil.rmtree(folder / "src", ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    copy = Path(shutil.copytree(ROOT / "src", folder / "src", ignore=ignore))
    # An editable installation may find packages by a hook, which comes before every path.
    (copy / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(type(f), '__module__', '')]\n"
    )
    return copy


def refuse_other_sources(copy: Path) -> None:
    """A test run that imported the real package would let every mutation survive, or none be tried."""
    found = subprocess.run(
        [sys.executable, "-c", "import manylora; print(manylora.__file__)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if str(copy) not in found:
        sys.exit(f"the tests would import {found.strip()}, not the copy at {copy}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--oracles", action="store_true", help="run the tests that distil, too: minutes a mutation"
    )
    parser.add_argument("--only", default="", help="only the mutations whose names hold this")
    options = parser.parse_args()
    tests = FAST + (ORACLES if options.oracles else [])
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        copy = fresh_copy(Path(name))
        refuse_other_sources(copy)
        if broken := failing_tests(copy, tests):
            sys.exit(f"the sources fail as they stand: {broken}")
        for mutation in chosen:
            apply(mutation, fresh_copy(Path(name)))
            failing = failing_tests(copy, tests)
            survivors += not failing
            more = f" (+ {len(failing) - 1} more)" if len(failing) > 1 else ""
            print(f"{mutation.name} -> {failing[0] + more if failing else 'SURVIVES'}", flush=True)
    print(f"{survivors} of {len(chosen)} mutations survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
