"""What a data set of pictures may look like, and what is said of one that does not."""

import io
import json

import pytest
import torch
from PIL import Image

from manylora.errors import DataError
from manylora.train.image_files import PictureFile, read_picture_files
from manylora.train.image_pixels import decode, to_pixels
from tests.train.image_sets import disc, write_folder, write_tar


def test_an_image_folder_gives_captions_and_bytes_in_its_order(tmp_path):
    pictures = [disc(seed) for seed in range(4)]
    found = list(read_picture_files(write_folder(tmp_path, pictures)))
    assert [(file.data, file.caption) for file in found] == pictures
    assert [file.name for file in found] == ["000.png", "001.png", "002.png", "003.png"]


def test_only_a_line_feed_ends_a_row(tmp_path):
    """The other ends of lines that Python knows may stand in a JSON text."""
    captions = [f"a{end}b" for end in ("\u2028", "\u2029", "\x85")]
    lines = [json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False) for text in captions]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [file.caption for file in read_picture_files(tmp_path)] == captions


def test_a_picture_that_is_missing_is_named_and_a_caption_that_is_missing_is_empty(tmp_path):
    rows = [
        {"file_name": "gone.png", "text": "a cat"},
        {"file_name": "gone.png"},
        {"file_name": "gone.png", "text": "  "},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert list(read_picture_files(tmp_path)) == [
        PictureFile("gone.png", caption, None) for caption in ("a cat", "", "")
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "a cat"}', "'file_name' must be the name of a file, got None"),
        ('{"file_name": "/etc/passwd"}', "'file_name' must lie in the folder"),
        ('{"file_name": "../up.png"}', "'file_name' must lie in the folder"),
        ('{"file_name": "a.png", "text": 3}', "'text' must be a text, got 3"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path, line, problem):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n\n' + line)
    with pytest.raises(DataError, match=rf"metadata\.jsonl, line 3: {problem}"):
        list(read_picture_files(tmp_path))


def test_a_webdataset_gives_the_same_from_one_tar_and_from_many(tmp_path):
    data, caption = disc(0)
    first = {
        "a/0.jpg": data,
        "a/0.txt": caption.encode() + b"\n",
        "a/1.txt": b"no picture",
        "a/1.cls": b"3",
    }
    second = {
        "b.PNG": data,
        "b.json": b'{"caption": "told"}',
        "c.d.png": data,
        "e.png": data,
        "e.json": b"{}",
    }
    one = list(read_picture_files(write_tar(tmp_path / "0.tar", first)))
    write_tar(tmp_path / "1.tar", second)
    both = list(read_picture_files(tmp_path))
    assert both[: len(one)] == one
    # What follows the first dot is the kind of the member: c.d.png is no png of the sample c.
    assert [(file.name, file.caption) for file in both] == [
        (f"{tmp_path / '0.tar'}: a/0.jpg", caption),
        (f"{tmp_path / '1.tar'}: b.png", "told"),
        (f"{tmp_path / '1.tar'}: e.png", ""),
    ]
    assert all(file.data == data for file in both)


def test_a_webdataset_that_cannot_be_read(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"a.png": b"x" * 2000})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"0\.tar cannot be read"):
        list(read_picture_files(path))
    write_tar(path, {"a.png": b"x", "a.json": b"{"})
    with pytest.raises(DataError, match=r"0\.tar: a: the caption cannot be read"):
        list(read_picture_files(path))


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file"])
def test_no_data_set(tmp_path, there):
    path = tmp_path if there == "an empty folder" else tmp_path / "it"
    if there == "a file":
        path.write_text("hello")
    with pytest.raises(DataError, match=r"is no image data set: expected a folder with metadata\.jsonl"):
        list(read_picture_files(path))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_picture_is_scaled_by_its_shorter_side_and_cropped_round_the_middle():
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 48, 32))
    pixels = decode(png(wide), 16)
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels[:, 8, 8], torch.tensor([-1.0, -1.0, 1.0])), "blue, in [-1, 1]"
    assert (to_pixels(pixels[None])[0, :, 3:-3] == (0, 0, 255)).all(), "the red ends are cut off"


def test_what_is_transparent_is_white_and_greys_are_colours():
    assert (decode(png(Image.new("RGBA", (8, 8), (200, 0, 0, 0))), 8) == 1.0).all()
    assert (decode(png(Image.new("L", (8, 8), 0)), 8) == -1.0).all()


@pytest.mark.parametrize("data", [None, b"", b"not a picture", disc(0)[0][:90]])
def test_bytes_that_are_no_picture(data):
    with pytest.raises(DataError):
        decode(data, 16)
