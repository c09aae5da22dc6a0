"""Files that say how they were made, and grids whose cells are the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manylora.errors import DataError
from manylora.image.grid import labelled_grid
from manylora.image.output import Picture
from manylora.image.params import ImageParams
from manylora.image.png import PARAMETERS_KEY, chunks_of, read_settings, save_png
from manylora.lifecycle import RequestState, TerminalEvent
from manylora.lora.mixture import Mixture


def picture(prompt: str = "a cat, ein Bär 🐻") -> Picture:
    return Picture(
        request_id="request-0",
        index=0,
        prompt=prompt,
        params=ImageParams(
            seed=3, guidance=1.5, negative_prompt="blurred", width=16, height=8, strength=0.6
        ),
        mixture=Mixture.parse("lcm:1+style:0.8"),
        base="models/icons/",
        event=TerminalEvent(RequestState.FINISHED),
        image=Image.effect_noise((16, 8), 90).convert("RGB"),
    )


def test_a_file_says_how_it_was_made(tmp_path: Path) -> None:
    made = picture()
    assert made.image is not None
    save_png(made.image, tmp_path / "it.png", chunks_of(made))
    settings = read_settings(tmp_path / "it.png")
    version = settings.pop("version")
    assert settings == made.settings
    assert settings["lora"] == {"lcm": 1.0, "style": 0.8}
    assert settings["prompt"].endswith("Bär 🐻")
    with Image.open(tmp_path / "it.png") as read:
        assert np.array_equal(np.asarray(read), np.asarray(made.image))
        assert read.info[PARAMETERS_KEY] == (
            "a cat, ein Bär 🐻 <lora:lcm:1> <lora:style:0.8>\n"
            "Negative prompt: blurred\n"
            "Steps: 4, Sampler: LCM, CFG scale: 1.5, Seed: 3, Size: 16x8, Model: icons, "
            f"Denoising strength: 0.6, Version: manylora {version}"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["it.png"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = picture(), tmp_path / "it.png"
    assert made.image is not None
    save_png(made.image, path, chunks_of(made))
    before = path.read_bytes()

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_png(Image.new("RGB", (4, 4)), path, {})
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["it.png"]


def test_a_picture_of_somebody_else_has_no_settings(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="does not say how it was made"):
        read_settings(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be read"):
        read_settings(tmp_path / "broken.png")


def test_the_cells_of_a_grid_are_the_pictures() -> None:
    colours: list[list[str | None]] = [["red", "green", "blue"], ["black", "yellow", None]]
    cells = [[None if c is None else Image.new("RGB", (48, 32), c) for c in row] for row in colours]
    grid = labelled_grid(cells, ["steps 1", "steps 2", "steps 4"], ["style 0", "style 0.8"], "a cat")
    pixels = np.asarray(grid).reshape(-1, 3)

    def count(*colour: int) -> int:
        return int((pixels == colour).all(axis=1).sum())

    # A cell of 48 x 32 is enlarged three times, to be 96 pixels high at least.
    for colour in ((0, 128, 0), (0, 0, 255), (255, 255, 0)):
        assert count(*colour) == 9 * 48 * 32
    assert count(0, 0, 0) > 9 * 48 * 32, "labels are black too"
    assert count(255, 0, 0) > 9 * 48 * 32, "so is the frame of what failed red"


def test_a_grid_without_rows_and_one_of_nothing_but_failures() -> None:
    cells = [[Image.new("RGB", (128, 128), "blue")] * 2]
    assert labelled_grid(cells, ["a" * 40, "b"], [""]).width > 2 * 128
    assert labelled_grid([[None]], ["steps 1"], [""]).size > (90, 90)
