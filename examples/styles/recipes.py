"""The styles: which icon sets they are drawn from, in which look, and under which licence their LoRA may be shipped."""

from collections.abc import Mapping
from dataclasses import dataclass

from icons.icon_sets import BASE_SETS, PACKAGES

from styles.looks import LOOKS


@dataclass(frozen=True)
class Style:
    """One style."""

    sets: tuple[str, ...]
    look: str | None = None
    """None: as the set draws it."""

    @property
    def licences(self) -> tuple[str, ...]:
        return tuple(sorted({PACKAGES[name].licence for name in self.sets}))

    @property
    def is_shipped(self) -> bool:
        """Whether a LoRA of it may lie in the repository: none that asks for attribution or the same licence."""
        return set(self.licences) <= {"Apache-2.0", "MIT"}


SETS_AS_THEY_ARE = (
    "fluent-emoji-high-contrast",
    "fluent-emoji",
    "twemoji",
    "openmoji",
    "emojione",
)

STYLES: Mapping[str, Style] = {
    **{look: Style(BASE_SETS, look) for look in LOOKS},
    **{name: Style((name,)) for name in SETS_AS_THEY_ARE},
}
"""Looks are made from the base's own sets: what is new in them is the look alone."""
