"""What `--grid` says: one or two axes, along which one setting of a picture or the weight of one LoRA changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from manylora.errors import ConfigError
from manylora.image.params import ImageParams
from manylora.lora.mixture import Mixture

_NUMBERS: dict[str, Callable[[str], float]] = {
    "steps": int,
    "guidance": float,
    "seed": int,
    "strength": float,
}
"""Settings that can be swept."""


@dataclass(frozen=True)
class Axis:
    """A setting, or the name of a LoRA, and the values that it takes in turn."""

    name: str
    values: tuple[float, ...]

    @property
    def labels(self) -> list[str]:
        return [f"{self.name} {value:g}" for value in self.values]

    def put(self, value: float, params: ImageParams, mixture: Mixture) -> tuple[ImageParams, Mixture]:
        """Return params and mixture with this value."""
        if self.name in _NUMBERS:
            return replace(params, **{self.name: value}), mixture  # type: ignore[arg-type]
        return params, Mixture(tuple({**dict(mixture.weights), self.name: value}.items()))


@dataclass(frozen=True)
class Sweep:
    """Columns, and rows if there are two axes."""

    columns: Axis
    rows: Axis | None = None

    @property
    def row_labels(self) -> list[str]:
        return [""] if self.rows is None else self.rows.labels

    def cells(self, params: ImageParams, mixture: Mixture) -> list[list[tuple[ImageParams, Mixture]]]:
        """Return what each cell is made with, row by row."""
        starts = (
            [(params, mixture)]
            if self.rows is None
            else [self.rows.put(value, params, mixture) for value in self.rows.values]
        )
        return [[self.columns.put(value, *start) for value in self.columns.values] for start in starts]


def parse_sweep(given: Sequence[str], params: ImageParams, mixture: Mixture) -> Sweep:
    """Read one or two of "steps=1,2,4" and "style=0,0.5,1".

    Raises:
        ConfigError: more axes, an axis that is neither a setting nor a LoRA of the mixture, values that are no numbers.
        RequestError: a value that the setting does not take.
    """
    axes = [_axis(text, mixture) for text in given]
    if len(axes) > 2 or len({axis.name for axis in axes}) < len(axes):
        raise ConfigError(f"--grid takes one or two different axes, columns and rows; got {list(given)}")
    sweep = Sweep(*axes)
    sweep.cells(params, mixture)  # each value is checked where it is put
    return sweep


def _axis(text: str, mixture: Mixture) -> Axis:
    name, equals, values = text.partition("=")
    known = [*_NUMBERS, *mixture.names]
    if not equals or name not in known:
        raise ConfigError(
            f"--grid '{text}': expected AXIS=VALUE,VALUE,.. with one of the axes {', '.join(known)}"
        )
    number = _NUMBERS.get(name, float)
    try:
        return Axis(name, tuple(number(value) for value in values.split(",")))
    except ValueError:
        raise ConfigError(
            f"--grid '{text}': expected {'whole numbers' if number is int else 'numbers'} with commas between"
        ) from None
