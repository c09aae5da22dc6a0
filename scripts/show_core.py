"""Show that the core keeps its promises: a line for each, with figure and bound; exit status 1 on any failure.

python scripts/show_core.py [PART ...]      parts: see below; all of them if none is named
"""

import sys

from points import show

PARTS = ("shapes", "checks", "float64", "residency", "steptime", "equality", "speed")

if __name__ == "__main__":
    sys.exit(show("core_points", PARTS))
