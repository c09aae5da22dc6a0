"""Rank against quality and bytes: acceleration LoRAs cut by their singular values, and one that learnt at few ranks."""

from collections.abc import Iterator

from lcm_points.records import newest, thousandth
from points import Line, missing

COMMAND = "examples/lcm/run.sh rank-4 ranks"


def lines() -> Iterator[Line]:
    record = newest("ranks")
    if record is None:
        yield missing("acceleration LoRAs at smaller ranks", COMMAND)
        return
    for row in record.rows:
        if row.row.lora:
            size = "" if row.lora_bytes is None else f", {row.lora_bytes / 1e6:.2f} MB"
            yield Line(row.row.label, f"KID x 1000 {thousandth(row.kid)}{size}", "reported", True)
    lora = record.values["config"]["lcm"]
    cut = record.find(lora=f"{lora}-cut-1")
    yield Line("down to rank 1", "measured" if cut else "not measured", "measured", cut is not None)
    retrained = record.values["config"].get("retrained") or []
    yield Line("retrained at a small rank", ", ".join(retrained) or "none", "one", bool(retrained))
