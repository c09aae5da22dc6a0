import subprocess
import sys

import pytest

from manylora.bench.text.timeline import RunFigures, Timeline


def test_figures_of_a_run_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("manylora.bench.text.timeline.time.perf_counter", lambda: now[0])
    line = Timeline(2)
    for at, request in [(101.0, 0), (102.0, 1), (103.0, 0), (105.0, 0), (110.0, 1)]:
        now[0] = at
        line.note(request)
    figures = line.figures([[1, 2, 3], [4, 5]], adapter_loads=7)
    assert figures.wall_s == 10
    assert figures.tokens_per_s == 0.5
    assert figures.requests_per_s == 0.2
    assert figures.ttft_p50_s == 1.5
    assert figures.ttft_p99_s == pytest.approx(1.99)
    assert figures.tpot_p50_s == 5  # of 2 and 8
    assert figures.outputs == ((1, 2, 3), (4, 5))
    assert figures.adapter_loads == 7


def test_single_tokens_have_no_time_per_token():
    line = Timeline(1)
    line.note(0)
    assert line.figures([[1]]).tpot_p50_s == 0


def test_figures_survive_json():
    line = Timeline(1)
    line.note(0)
    figures = line.figures([[1]])
    assert RunFigures.from_json({**vars(figures), "outputs": [[1]]}) == figures


def test_a_child_does_not_begin_at_its_parents_peak():
    """`getrusage` would: a benchmark's processes would then all look as large as the one that started them."""
    child = "from manylora.bench.text.timeline import peak_rss_bytes; print(peak_rss_bytes())"
    script = f"import subprocess, sys; held = b'x' * (600 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert 1 << 20 < int(printed) < 500 << 20
