"""Show that the server keeps its promises: a line for each, with figure and bound; exit status 1 on any failure.

python scripts/show_server.py [PART ...]      parts: see below; all of them if none is named
"""

import sys

from points import show

PARTS = ("faults", "schemathesis", "end_to_end", "overhead", "workload", "fairness")

if __name__ == "__main__":
    sys.exit(show("server_points", PARTS))
