"""Show that serving on a CPU is as fast as claimed: a line for each point, with figure and bound; exits 1 on a failure.

python scripts/show_speed.py [PART ...]      parts: see below; all of them if none is named

What takes an idle machine and minutes is read from kept records; its line names the command that makes them.
"""

import sys

from points import show

PARTS = ("kernels", "steps", "peers", "many", "wide", "ablations", "first_token", "scale")

if __name__ == "__main__":
    sys.exit(show("speed_points", PARTS))
