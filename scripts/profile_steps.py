"""Where a step's time goes: a trace, the twenty operations that cost most, and how long each span of a step took.

python scripts/profile_steps.py [--batch 128] [--context 96] [--rank 8] [--dtype float32]
                                 [--steps 8] [--trace trace.json]

Steps that decode, every sequence on an adapter of its own, all resident. The spans are the engine's own: take in,
schedule, batch, forward, sample, extend; the forward pass is told by products, LoRA and attention too, since its
layers may be one native call that a profiler cannot look into. The trace opens in ui.perfetto.dev.
"""

import argparse
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from manylora.bench.adapters import write_adapters
from manylora.bench.steps.config import Point
from manylora.bench.steps.run import decoding
from manylora.bench.text.pass_clock import PassClock
from manylora.lora.library import Library
from manylora.models.demo_model import DEMO_MODEL
from manylora.models.loading import load_model
from manylora.models.sites import base_sites

SPANS = ("take in", "schedule", "batch", "forward", "sample", "extend")
NUM_SHOWN = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--batch", type=int, default=128, help="sequences, each with an adapter of its own")
    parser.add_argument("--context", type=int, default=96, help="tokens of each")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--trace", type=Path, help="where to write the trace")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, point = (
        load_model(options.model, dtype=options.dtype),
        Point(options.batch, options.context, options.rank),
    )
    with TemporaryDirectory(prefix="manylora-profile-") as folder:
        write_adapters(Path(folder), base_sites(model.config), point.batch, [point.rank], seed=0)
        with decoding(model, Library(folder), point, 2 * options.steps, seed=0) as one_step:
            one_step()  # so that what is made once is made
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            with profile(activities=[ProfilerActivity.CPU]) as watched:
                for _ in range(options.steps - 1):
                    one_step()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            with PassClock(model) as clock:
                for _ in range(options.steps):
                    one_step()
    steps, events = options.steps - 1, watched.key_averages()
    print(events.table(sort_by="self_cpu_time_total", row_limit=NUM_SHOWN, max_name_column_width=60))
    for event in sorted(events, key=lambda event: -event.cpu_time_total):
        if event.key in SPANS:
            print(f"{event.key:10} {1e-3 * event.cpu_time_total / steps:8.2f} ms a step")
    for part in ("base_s", "lora_s", "attention_s", "forward_s"):
        spent_s = sum(getattr(one, part) for one in clock.passes)
        print(f"{part.removesuffix('_s'):10} {1e3 * spent_s / len(clock.passes):8.2f} ms a forward pass")
    print(f"{faults / steps:.0f} page faults a step")
    if options.trace is not None:
        watched.export_chrome_trace(str(options.trace))


if __name__ == "__main__":
    main()
