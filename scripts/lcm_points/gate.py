"""Something to distil: the teacher itself at few steps against itself at 32, measured before any distilling.

Read from examples/icons/gate.json, which `python -m icons.gate` leaves.
"""

import json
from collections.abc import Iterator

from points import Line, missing
from tested import ROOT

RECORD = ROOT / "examples" / "icons" / "gate.json"


def lines() -> Iterator[Line]:
    if not RECORD.is_file():
        yield missing("the teacher at few steps", "make icons")
        return
    told = json.loads(RECORD.read_text(encoding="utf-8"))
    for row in told["rows"]:
        how = "unguided" if row["guidance"] == 1 else f"guidance {row['guidance']:g}"
        point = f"teacher, {how}, {row['steps']} steps: latent MSE to its 32 steps"
        figure = f"{row['latent_mse']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        if row["steps"] <= 4:
            yield Line(point, figure, f"> {told['bound']}", row["low"] > told["bound"])
        else:
            yield Line(point, figure, "reported", True)
