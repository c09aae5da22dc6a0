"""Show how good few steps and mixtures are: a line for each point, with figure and bound; exits 1 on any failure.

python scripts/show_quality.py [PART ...]       parts: see below; all of them if none is named
"""

import sys

from points import show

PARTS = ("oracles", "few_steps", "styles", "ranks", "weights", "diagnosis", "reproducible")

if __name__ == "__main__":
    sys.exit(show("quality_points", PARTS))
