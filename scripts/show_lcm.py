"""Show that few steps keep what they promise: a line for each point, with figure and bound; exits 1 on any failure.

python scripts/show_lcm.py [PART ...]       parts: see below; all of them if none is named
"""

import sys

from points import show

PARTS = ("oracles", "mutations", "gate", "steps", "universal", "cost", "bad_input", "formats")

if __name__ == "__main__":
    sys.exit(show("lcm_points", PARTS))
