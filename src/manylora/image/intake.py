"""Turns what a caller asks into pictures to be made, or refuses it. Runs on the caller's thread; changes nothing."""

import secrets
from dataclasses import replace
from itertools import count

from PIL import Image

from manylora.errors import RequestError
from manylora.image.params import DEFAULT_STRENGTH, ImageParams
from manylora.image.pixels import to_pixels
from manylora.image.request import ImageRequest
from manylora.image.sampler import timesteps_of
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.models.diffusion_base import DiffusionBase


class Intake:
    """Knows the sizes and the schedule of the base, and where names are looked up."""

    def __init__(self, base: DiffusionBase, library: Library) -> None:
        self._base = base
        self._library = library
        self._arrivals = count()

    def requests(
        self,
        prompt: str,
        params: ImageParams,
        mixture: MixtureLike,
        image: Image.Image | None,
        request_id: str | None,
    ) -> list[ImageRequest]:
        """Make the n pictures of a request, each with its size and its seed.

        Raises:
            RequestError: a prompt that is no text, or longer than the text encoder takes; a size, a number of steps
                or a mixture that cannot be run.
            AdapterNotFoundError: a name that the library does not hold.
        """
        if not isinstance(prompt, str):
            raise RequestError(f"expected the prompt as text, got {type(prompt).__name__}")
        for text in (prompt, params.negative_prompt or ""):
            self._check_length(text)
        parsed = Mixture.parse(mixture)
        for name in parsed.names:
            self._library.locate(name)
        params = self._resolved(params, image)
        width, height = params.width, params.height
        assert width is not None
        assert height is not None
        assert params.seed is not None
        timesteps = timesteps_of(params, self._base.schedule.num_timesteps)
        pixels = None if image is None else to_pixels(image, width, height)
        request_id = request_id or f"request-{next(self._arrivals)}"
        return [
            ImageRequest(
                request_id=request_id,
                index=index,
                prompt=prompt,
                params=replace(params, seed=params.seed + index, n=1),
                mixture=parsed,
                timesteps=timesteps,
                image=pixels,
            )
            for index in range(params.n)
        ]

    def _resolved(self, params: ImageParams, image: Image.Image | None) -> ImageParams:
        """Put values where the params leave them open."""
        if image is None and params.strength is not None:
            raise RequestError(
                "image parameter strength: only with a picture to start from, and there is none"
            )
        default = (self._base.default_size,) * 2 if image is None else image.size
        width, height = params.width or default[0], params.height or default[1]
        for name, side in (("width", width), ("height", height)):
            self._check_side(name, side)
        return replace(
            params,
            width=width,
            height=height,
            # Few enough bits for every program that may read the seed from the picture's metadata.
            seed=secrets.randbits(32) if params.seed is None else params.seed,
            strength=(params.strength or DEFAULT_STRENGTH) if image is not None else None,
        )

    def _check_length(self, prompt: str) -> None:
        if cut := self._base.cut_off(prompt):
            limit = min(tokenizer.model_max_length for tokenizer in self._base.tokenizers)
            raise RequestError(
                f"the prompt is longer than the {limit} tokens, marks included, that the text encoder of "
                f"'{self._base.path}' takes; its end would have no effect: {cut!r}. Make it shorter"
            )

    def _check_side(self, name: str, side: int) -> None:
        factor = self._base.latent_factor
        if side % factor:
            below = side - side % factor
            near = f"{below} or {below + factor}" if below else str(factor)
            raise RequestError(
                f"image parameter {name}: expected a multiple of {factor} pixels, which make one of a latent of "
                f"'{self._base.path}', got {side}; nearest: {near}"
            )
