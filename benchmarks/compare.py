"""Is one revision faster than another? Runs the text benchmark at both, in turns, on this machine.

    python benchmarks/compare.py REV_A REV_B [--rounds N] -- OPTIONS OF `manylora bench text`

Each revision is checked out into a working tree of its own and run there with this Python's packages. The last line is
one JSON object: revision to the tokens_per_s of each round, medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

FIGURES = ("tokens_per_s", "base_tokens_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs=2, metavar="REV")
    parser.add_argument("--rounds", type=int, default=3)
    # argparse cannot tell what follows "--" from a positional of its own.
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, options = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    rates: dict[str, dict[str, list[float]]] = {
        revision: {figure: [] for figure in FIGURES} for revision in arguments.revisions
    }
    with TemporaryDirectory(prefix="manylora-compare-") as folder:
        trees = {revision: Path(folder, str(i)) for i, revision in enumerate(arguments.revisions)}
        try:
            for revision, tree in trees.items():
                subprocess.run(
                    ["git", "worktree", "add", "--detach", "--quiet", tree, revision], check=True
                )
            for _ in range(arguments.rounds):
                for revision, tree in trees.items():
                    row = bench(tree, options)
                    for figure in FIGURES:
                        rates[revision][figure].append(row[figure])
                    print(f"{revision}: {row['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", tree], check=False)
    before, after = (rates[revision] for revision in arguments.revisions)
    ratio = {figure: round(median(after[figure]) / median(before[figure]), 4) for figure in FIGURES}
    for figure in FIGURES:
        print(
            f"{figure}: {median(before[figure]):.1f} -> {median(after[figure]):.1f} ({ratio[figure]:.3f}x)"
        )
    print(json.dumps({"bench": "compare", "rates": rates, "ratio": ratio}))


def bench(tree: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark of the working tree `tree` once; return its row."""
    command = [
        sys.executable,
        "-m",
        "manylora",
        "bench",
        "text",
        "--repeats",
        "1",
        "--json",
        "--no-record",
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True
    ).stdout
    # An installed copy of the package must not come before the tree's.
    assert head.startswith(row["commit"]), f"measured {row['commit']} instead of {head}"
    return row


if __name__ == "__main__":
    main()
