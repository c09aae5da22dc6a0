"""Schemathesis invents requests from the server's own OpenAPI document: none may bring a 5xx."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from points import Line
from server_points.served import headers, tiny_server

MAX_EXAMPLES = 60
CHECKS = "not_a_server_error"


def lines() -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder)) as server:
        (key,) = headers(server).values()
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", server.url + "/openapi.json"]
        command += [
            "--header",
            f"Authorization: {key}",
            "--checks",
            CHECKS,
            "--max-examples",
            str(MAX_EXAMPLES),
        ]
        command += ["--seed", "1", "--request-timeout", "300", "--continue-on-failure", "--no-color"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        alive = server.scrape()["manylora_engine_up"] == 1
    told = done.stdout + done.stderr
    counts = re.search(r"(\d+) generated.*", told)
    yield Line(
        "requests invented from the OpenAPI document",
        counts.group(0) if counts else told[-200:],
        "no 5xx",
        done.returncode == 0 and counts is not None,
    )
    yield Line("the engine afterwards", "up" if alive else "down", "up", alive)
    if done.returncode:
        print(told[-4000:], file=sys.stderr)
