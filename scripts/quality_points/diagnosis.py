"""Does `manylora inspect` foresee which mixtures break, better than what one would look at first, and mend them?

Read from docs/data/mixture_breaks.json, which half an hour on one core makes.
"""

import json
import math
from collections.abc import Iterator

from manylora.bench.image.intervals import Interval
from mixture_breaks import DATA, MIN_LORAS
from mixture_breaks_report import PLAIN, VERDICT, Measured, ahead, areas, mended, read
from points import Line, missing

COMMAND = "examples/mixtures/run.sh"
MIN_SETS = 150
MIN_AREA, MIN_MENDED = 0.85, 0.60


def lines() -> Iterator[Line]:
    if not DATA.is_file():
        yield missing("which sets of LoRAs break, and whether it is foreseen", COMMAND)
        return
    measured = read()
    yield _what(measured)
    found = areas(measured, "held")
    yield Line(
        "verdict: area under the ROC curve, held-out sets",
        _told(found[VERDICT]),
        f">= {MIN_AREA}",
        found[VERDICT].value >= MIN_AREA,
    )
    for name in PLAIN:
        away = ahead(measured, name)
        yield Line(
            f"verdict / {name}",
            f"{_told(found[VERDICT])} / {_told(found[name])}: {_told(away)} more",
            "above",
            away.value > 0,
        )
    share, rows = mended(measured)
    if len(rows) < int(
        measured.is_broken(measured.group("held")).sum()
    ):  # none, or an interrupted run's first ones
        yield missing("broken sets that the proposed weights mend", f"{COMMAND} repair")
        return
    yield Line(
        f"broken held-out sets that the proposed weights mend, of {len(rows)}",
        _told(share),
        f">= {MIN_MENDED:.0%}",
        share.value >= MIN_MENDED,
    )


def _what(measured: Measured) -> Line:
    kept = json.loads(DATA.read_text(encoding="utf-8"))
    num_loras = len(kept["adapters"]) - 1
    held = measured.group("held")
    num_broken = int(measured.is_broken(held).sum())
    return Line(
        f"random sets of 1-8 out of {num_loras} LoRAs",
        f"{len(measured.rows)}; held out {len(held)}, of which {num_broken} broke",
        f">= {MIN_SETS} sets of >= {MIN_LORAS} LoRAs",
        len(measured.rows) >= MIN_SETS and num_loras >= MIN_LORAS,
    )


def _told(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "no set of one kind"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
