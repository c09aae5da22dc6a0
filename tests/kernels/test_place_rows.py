"""Rank rows come from wherever they lie among an adapter's values, to their places and nowhere else."""

import pytest
import torch

from manylora.errors import ConfigError
from manylora.kernels import PlacedRows, available_backends, place_rows

UNTOUCHED = 0xA5


def placed(*rows: tuple[int, int, int, int]) -> PlacedRows:
    """Rows of (begin, stride, length, offset)."""
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).T.contiguous()
    return PlacedRows(*(column.clone() for column in columns))


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_and_columns_go_to_their_places_and_nothing_else_is_written(backend, dtype):
    a, b = torch.randn(3, 7).to(dtype), torch.randn(5, 3).to(dtype)
    size = a.itemsize
    image = torch.full((400,), UNTOUCHED, dtype=torch.uint8)
    rows = [(7 * r, 1, 7, 200 - 50 * r) for r in range(3)]
    columns = [(21 + r, 3, 5, 240 + 5 * size * r) for r in range(3)]
    place_rows(torch.cat([a.flatten(), b.flatten()]), image, placed(*rows, *columns), backend=backend)
    written = torch.zeros(400, dtype=torch.bool)
    for wanted, (_, _, length, offset) in zip([*a, *b.T], [*rows, *columns], strict=True):
        got = image[offset : offset + length * size]
        assert torch.equal(got, wanted.contiguous().view(torch.uint8))
        written[offset : offset + length * size] = True
    assert 0 < written.sum() < 400
    assert (image[~written] == UNTOUCHED).all()


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_eight_bits_are_a_scale_and_the_nearest_values(backend, dtype):
    a, b = torch.randn(3, 7).to(dtype), torch.randn(5, 3).to(dtype)
    a[1] *= 1e-3  # each row has a scale of its own
    a[2] = 0
    image = torch.full((400,), UNTOUCHED, dtype=torch.uint8)
    rows = [(7 * r, 1, 7, 201 - 50 * r) for r in range(3)]  # no offset is a multiple of a float's size
    columns = [(21 + r, 3, 5, 241 + 9 * r) for r in range(3)]
    source = torch.cat([a.flatten(), b.flatten()])
    place_rows(source, image, placed(*rows, *columns), dtype=torch.int8, backend=backend)
    written = torch.zeros(400, dtype=torch.bool)
    for wanted, (_, _, length, offset) in zip([*a.float(), *b.T.float()], [*rows, *columns], strict=True):
        scale = image[offset : offset + 4].clone().view(torch.float32)
        values = image[offset + 4 : offset + 4 + length].clone().view(torch.int8)
        assert torch.equal(scale, wanted.abs().max().reshape(1) / 127)
        assert (values.float() * scale - wanted).abs().max() <= scale / 2 * 1.001
        assert values.abs().max() == (127 if scale else 0)
        written[offset : offset + 4 + length] = True
    assert (image[~written] == UNTOUCHED).all()


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_in_eight_bits(backend, bad):
    image = torch.zeros(16, dtype=torch.uint8)
    source = torch.tensor([1.0, bad, 2.0, 3.0])
    place_rows(source, image, placed((0, 1, 2, 0), (2, 1, 2, 8)), dtype=torch.int8, backend=backend)
    scales = image.view(2, 8)[:, :4].contiguous().view(torch.float32).flatten()
    assert scales.isnan().tolist() == [True, False]


def test_rows_become_int8_or_stay_as_they_are():
    with pytest.raises(ConfigError, match=r"become torch.int8, got dtype torch.float16"):
        place_rows(torch.ones(4), torch.zeros(16, dtype=torch.uint8), placed(), dtype=torch.float16)


def test_no_rows_are_fine():
    place_rows(torch.ones(3), torch.zeros(0, dtype=torch.uint8), placed())


@pytest.mark.parametrize(
    "row",
    [(-1, 1, 4, 0), (7, 1, 4, 0), (0, 3, 5, 0), (0, 1, 4, 17), (0, 1, 4, -4), (0, -1, 4, 0), (0, 1, -4, 0)],
    ids=[
        "before",
        "past",
        "strided past",
        "past the image",
        "before the image",
        "backwards",
        "negative length",
    ],
)
def test_a_row_that_lies_elsewhere_is_refused_and_nothing_is_written(row):
    image = torch.zeros(32, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="do not lie in a source of 10 values and an image of 32 bytes"):
        place_rows(torch.ones(10), image, placed((0, 1, 4, 0), row))
    assert not image.any()


def test_values_of_another_size_and_images_of_another_type_are_refused():
    with pytest.raises(ConfigError, match=r"contiguous and one of.*float64"):
        place_rows(torch.ones(4, dtype=torch.float64), torch.zeros(8, dtype=torch.uint8), placed())
    with pytest.raises(ConfigError, match="uint8"):
        place_rows(torch.ones(4), torch.zeros(8), placed())
