"""The second objective learns what it should: against teachers whose flow is known in closed form, and end to end."""

from collections.abc import Iterator

from points import Line
from tested import tested

GROUPS = {
    "phases: loss, grid and draws are the formulas": [
        "tests/distill/test_phased.py",
        "-k",
        "formula or phases_end or draws or gradient or nowhere or average or ddim",
    ],
    "phases: Gaussians, lines and planes end where the teacher does": [
        "tests/distill/test_phased.py",
        "-k",
        "gaussian or line or plane or phase_alone",
    ],
    "phases: a tiny UNet comes closer to its teacher, deterministically": [
        "tests/distill/test_trainer.py",
        "-k",
        "two_phases",
    ],
    "the probe's figures are those of merged weights": ["tests/models/test_image_probe.py"],
}


def lines() -> Iterator[Line]:
    yield from tested(GROUPS)
