"""The same seeds give the same bits: the shipped base and LoRA in two processes, and a distillation that was killed."""

import subprocess
import sys
from collections.abc import Iterator

from points import Line
from tested import ROOT, tested

SHIPPED = ROOT / "examples" / "icons"
DRAW = """
import hashlib, sys
from manylora import ImageEngine, ImageParams, Library, load_diffusion_base
base, loras = sys.argv[1:]
with ImageEngine(load_diffusion_base(base), Library(loras)) as engine:
    pictures = engine.generate(["a cat"] * 4, [ImageParams(steps=4, seed=n) for n in range(4)], ["lcm"] * 4)
print(hashlib.sha256(b"".join(picture.image.tobytes() for picture in pictures)).hexdigest())
"""


def lines() -> Iterator[Line]:
    hashes = {_drawn() for _ in range(2)}
    yield Line(
        "four pictures of the shipped LCM-LoRA, drawn by two processes",
        ", ".join(sorted(one[:16] for one in hashes)),
        "the same bits",
        len(hashes) == 1 and all(len(one) == 64 for one in hashes),  # an error is no hash
    )
    yield from tested(
        {
            "a distillation that was killed ends with the same bits": [
                "tests/distill/test_trainer.py",
                "-k",
                "killed",
            ],
            "a probe of one seed gives the same bits": [
                "tests/models/test_image_probe.py",
                "-k",
                "same_bits",
            ],
        }
    )


def _drawn() -> str:
    command = [sys.executable, "-c", DRAW, str(SHIPPED / "model"), str(SHIPPED / "loras")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr[-200:]
