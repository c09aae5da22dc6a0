"""Show that few steps keep what they promise: a line for each point, with figure and bound; exits 1 on any failure.

python scripts/show_lcm.py [PART ...]       parts: see below; all of them if none is named
"""

import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/: it holds builders that the points share

PARTS = ("oracles", "mutations", "steps", "universal", "cost", "bad_input", "formats")


def main() -> int:
    parts = sys.argv[1:] or PARTS
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        sys.exit(f"unknown parts {unknown}; known: {', '.join(PARTS)}")
    failed = 0
    for part in parts:
        began = time.perf_counter()
        for line in importlib.import_module(f"lcm_points.{part}").lines():
            print(line, flush=True)
            failed += not line.ok
        print(f"      -- {part}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{failed} failed" if failed else "all points shown")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
