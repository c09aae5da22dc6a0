import pytest

from manylora.training.aside import directory_aside, write_text_aside


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with directory_aside(target) as aside:
        (aside / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def write_half_then_fail(target):
    with directory_aside(target) as aside:
        (aside / "file").write_text("half")
        raise RuntimeError("disk full")


def test_an_error_leaves_the_old_folder_as_it_was(tmp_path):
    target = tmp_path / "target"
    with directory_aside(target) as aside:
        (aside / "file").write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_half_then_fail(target)
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "target"
    for name in ("first", "second"):
        with directory_aside(target) as aside:
            (aside / name).write_text("")
    assert [path.name for path in target.iterdir()] == ["second"]


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    leftover = tmp_path / ".target.aside"
    leftover.mkdir()
    (leftover / "half").write_text("")
    with directory_aside(tmp_path / "target") as aside:
        (aside / "file").write_text("")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]
    assert not leftover.exists()


def test_a_text_is_replaced(tmp_path):
    for text in ("old", "new"):
        write_text_aside(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1
