"""`scripts/profile_steps.py` from end to end on a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "profile_steps.py"
SPANS = ("take in", "schedule", "batch", "forward", "sample", "extend")


def test_every_span_of_a_step_is_timed_and_traced(tiny_model, tmp_path):
    options = ["--batch", "2", "--context", "12", "--rank", "2", "--steps", "4", "--threads", "1"]
    trace = tmp_path / "trace.json"
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_model), *options, "--trace", str(trace)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = dict(re.findall(r"^(\S.*?) +([\d.]+) ms a step$", told, re.MULTILINE))
    assert times.keys() == {*SPANS}
    assert float(times["forward"]) > 0
    named = [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event]
    assert {span: named.count(span) for span in SPANS} == dict.fromkeys(SPANS, 3)
