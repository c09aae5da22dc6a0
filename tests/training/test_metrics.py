from manylora.training.metrics import MetricsLog


def test_rewind_forgets_what_the_continued_run_does_again(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    rows = [{"step": 0, "eval_loss": 3.0}, *({"step": step, "loss": 1.0 / step} for step in (1, 2, 3))]
    for row in [*rows, {"step": 2, "eval_loss": 2.0}]:
        log.append(row)
    log.rewind(2)
    assert log.rows() == rows[:3], "steps after 2, and what was measured after step 2, come again"
    log.rewind(-1)
    assert log.rows() == []


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert log.rows() == [{"step": 1, "loss": 1.0}]
    log.rewind(1)
    log.append({"step": 2, "loss": 0.5})
    assert [row["step"] for row in log.rows()] == [1, 2]
