"""Settings of the image engine."""

from dataclasses import dataclass

from manylora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEngineConfig:
    """How much memory adapters take and how many pictures share a pass. Device and dtype are the base model's."""

    max_batch: int = 8
    """Most pictures in one forward pass; with guidance each is two rows of it."""

    adapter_bytes: int = 1 << 30
    """Bytes of the pool that holds adapters. Those of one batch must fit; others stay until room is needed."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "adapter_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
