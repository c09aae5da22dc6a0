"""What the image engine gives back: by step, and when a picture is done."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from manylora.image.params import ImageParams
from manylora.lifecycle import RequestState, TerminalEvent
from manylora.lora.adapter import AdapterId
from manylora.lora.mixture import BASE, Mixture


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture that was asked for, at its end: made, or not and why."""

    request_id: str
    index: int
    """0 .. n - 1 among the pictures of the request."""
    prompt: str
    params: ImageParams
    """As they were used: with the size and this picture's own seed."""
    mixture: Mixture
    base: str
    """Folder or hub id of the base model."""
    event: TerminalEvent
    image: Image.Image | None = None
    """None unless it is finished."""
    adapters: Mapping[str, AdapterId] = field(default_factory=dict)
    """What the names of the mixture pointed at: a name may be pointed elsewhere, an identity is the content's."""

    @property
    def error(self) -> Exception | None:
        """Why it failed; None unless it did."""
        return self.event.error if self.event.state is RequestState.FAILED else None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that makes the picture again, as JSON takes it; what plays no part is left out."""
        params = {name: value for name, value in asdict(self.params).items() if value is not None}
        params.pop("n")
        if self.params.sampler != "lcm":
            params.pop("original_steps")
        return {
            "prompt": self.prompt,
            **params,
            "lora": dict(self.mixture.weights),
            "adapters": dict(self.adapters),
            "base": self.base,
        }


@dataclass(frozen=True, slots=True)
class ImageOutput:
    """What one step brought to one picture."""

    request_id: str
    index: int
    num_done: int
    """Steps done."""
    num_steps: int
    picture: Picture | None = None
    """Comes once, with the last output of the picture, however it ended."""


def refused(
    prompt: object, params: ImageParams | None, base: str, error: Exception, index: int = 0
) -> Picture:
    """A picture whose request was refused before it began."""
    event = TerminalEvent(RequestState.FAILED, error=error)
    return Picture("", index, str(prompt), params or ImageParams(), BASE, base, event)
