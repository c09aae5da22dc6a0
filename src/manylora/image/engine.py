"""The image engine: every picture names its own mixture of adapters; pictures of one size and course share each pass.

    engine = ImageEngine(load_diffusion_base(path), Library("adapters/"))
    pictures = engine.generate(["a cat", "a cat"], ImageParams(steps=4, seed=1), ["lcm", "lcm+papercut:0.8"])

The words are those of the text engine, the units others: a request is a picture, a step is one call of the UNet for a
batch of them. `submit` and `cancel` may be called from any thread; `step` from one. What cannot be made is refused when
it comes, or fails alone: the other pictures of the batch are finished unharmed.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor

from manylora.errors import AdapterError, ConfigError, ManyLoraError, RequestError
from manylora.image.adapters import DiffusionModel, fitting
from manylora.image.batch import ImageBatch
from manylora.image.config import ImageEngineConfig
from manylora.image.intake import Intake
from manylora.image.output import ImageOutput, Picture, refused
from manylora.image.params import ImageParams
from manylora.image.pixels import to_image
from manylora.image.request import ImageRequest
from manylora.image.scheduler import ImageScheduler
from manylora.lifecycle import FinishReason, RequestState, TerminalEvent
from manylora.lora.adapter import AdapterId
from manylora.lora.library import Library
from manylora.lora.mixture import MixtureLike
from manylora.models.attach import attach
from manylora.models.diffusion_base import DiffusionBase

PictureKey = tuple[str, int]
"""(request id, index) of a picture."""


class ImageEngine:
    """Makes pictures with one base model and any number of adapters, which are attached and never merged."""

    def __init__(
        self, base: DiffusionBase, library: Library, config: ImageEngineConfig | None = None
    ) -> None:
        """
        Args:
            base: on its device, in its dtype; it is as it was once the engine is closed.
            library: where the names in mixtures are looked up.
        """
        self.base = base
        self.config = config or ImageEngineConfig()
        self._library = library
        self._intake = Intake(base, library)
        self._scheduler = ImageScheduler(self.config.max_batch)
        self._lora = attach(
            DiffusionModel(base), library, memory_bytes=self.config.adapter_bytes, name=base.path
        )
        self._batch: ImageBatch | None = None
        self._identities: dict[str, AdapterId] = {}
        """What the names mean that the running batch uses."""
        self._open: dict[PictureKey, ImageRequest] = {}
        self._submitted: deque[ImageRequest] = deque()
        self._cancelled: deque[str] = deque()

    # -- requests

    def submit(
        self,
        prompt: str,
        params: ImageParams | None = None,
        mixture: MixtureLike = None,
        *,
        image: Image.Image | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue the pictures of a prompt. Returns the request's id.

        Args:
            mixture: what to make them with: a name, {name: weight}, "a:1+b:0.5", or None for the base.
            image: a picture to start from instead of noise.
        Raises:
            RequestError: a size, a number of steps, a mixture or an option that makes no sense.
            AdapterNotFoundError: a name that the library does not hold.
        """
        requests = self._intake.requests(prompt, params or ImageParams(), mixture, image, request_id)
        keys = [(request.request_id, request.index) for request in requests]
        if self._open.keys() & set(keys):
            raise RequestError(f"a request with the id '{keys[0][0]}' is being served; ids must differ")
        self._open |= dict(zip(keys, requests, strict=True))
        self._submitted.extend(requests)
        return keys[0][0]

    def cancel(self, request_id: str) -> None:
        """End a request at the next step. No effect on one that has ended."""
        self._cancelled.append(request_id)

    def has_work(self) -> bool:
        """Whether any picture has not ended."""
        return bool(self._open)

    # -- steps

    @torch.inference_mode()
    def step(self) -> list[ImageOutput]:
        """Bring one batch one call of the UNet further; returns what that brought to each of its pictures."""
        outputs = self._cancel()
        try:
            if self._batch is None:
                outputs += self._begin()
            if self._batch is not None:
                outputs += self._advance(self._batch)
        except Exception as error:
            # Out of memory, say: the engine goes on without these pictures, and does not wait for them for ever.
            self._abandon(error)
            raise
        return outputs

    def generate(
        self,
        prompts: SequenceOf[str],
        params: ImageParams | SequenceOf[ImageParams] | None = None,
        mixtures: SequenceOf[MixtureLike] | None = None,
        images: SequenceOf[Image.Image | None] | None = None,
        *,
        on_output: Callable[[ImageOutput], None] | None = None,
    ) -> list[Picture]:
        """Make pictures to their ends in as few passes as they can share.

        What else was submitted shares the steps, but is told to nobody. A call that breaks off (out of memory, say)
        cancels what is left of its own pictures.

        Args:
            params: one for all, or one per prompt.
            mixtures: one per prompt; None: all run the base.
            images: to start from, one per prompt; None: all start from noise.
            on_output: told of every step of these pictures, for those who show progress.
        Returns:
            The pictures in the order of the prompts, n for each. One that failed, at once or later, has its `error`
            set; the others are unharmed.
        """
        num = len(prompts)
        each = [params] * num if params is None or isinstance(params, ImageParams) else list(params)
        mixed = [None] * num if mixtures is None else list(mixtures)
        started = [None] * num if images is None else list(images)
        if not num == len(each) == len(mixed) == len(started):
            raise ConfigError(
                f"{num} prompts, {len(each)} params, {len(mixed)} mixtures and {len(started)} images do not match"
            )
        slots: list[Picture | PictureKey] = []
        try:
            for prompt, one, mixture, image in zip(prompts, each, mixed, started, strict=True):
                try:
                    request_id = self.submit(prompt, one, mixture, image=image)
                    slots += [(request_id, index) for index in range(one.n if one else 1)]
                except ManyLoraError as error:
                    num = one.n if one else 1
                    slots += [refused(prompt, one, self.base.path, error, i) for i in range(num)]
            done = self._finish_all({slot for slot in slots if isinstance(slot, tuple)}, on_output)
        except BaseException:
            # The caller may try again with fewer, and these would be made before them.
            keys = [slot for slot in slots if isinstance(slot, tuple)]
            self._drop([self._open[key] for key in keys if key in self._open])
            raise
        return [done[slot] if isinstance(slot, tuple) else slot for slot in slots]

    def close(self) -> None:
        """Take the adapters off the base model. What has not ended stays undone."""
        self._end_batch()
        self._lora.detach()

    def __enter__(self) -> "ImageEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside

    def _cancel(self) -> list[ImageOutput]:
        cancelled = {self._cancelled.popleft() for _ in range(len(self._cancelled))}
        return self._drop([request for key, request in list(self._open.items()) if key[0] in cancelled])

    def _drop(self, requests: SequenceOf[ImageRequest]) -> list[ImageOutput]:
        """End these as cancelled."""
        # First, or one that has ended here would begin later.
        while self._submitted:
            self._scheduler.add(self._submitted.popleft())
        outputs = []
        for request in requests:
            if request in self._scheduler.waiting:  # one that is just being submitted is not there yet
                self._scheduler.remove(request)
            outputs.append(self._end(request, request.lifecycle.cancel()))
        # A batch runs on with the pictures that are left, and not at all for none.
        if self._batch is not None and not self._left(self._batch):
            self._end_batch()
        return outputs

    def _begin(self) -> list[ImageOutput]:
        """Start the next batch, if anything waits; those whose mixture cannot be run at all fail here."""
        fit, misfits = fitting(self._lora, self._scheduler.next_batch())
        outputs = []
        for request, error in misfits:
            self._scheduler.remove(request)
            outputs.append(self._end(request, request.lifecycle.fail(error)))
        for request in fit:
            self._scheduler.remove(request)
            request.lifecycle.start()
        if fit:
            found = {name: self._identity(name) for request in fit for name in request.mixture.names}
            self._identities = {name: identity for name, identity in found.items() if identity is not None}
            self._batch = ImageBatch(self.base, self._lora, fit)
        return outputs

    def _advance(self, batch: ImageBatch) -> list[ImageOutput]:
        outputs = []
        for request, is_finite in zip(batch.requests, batch.advance(), strict=True):
            if request.lifecycle.terminal is not None:
                continue
            if is_finite:
                outputs.append(ImageOutput(*_key(request), batch.num_done, batch.num_steps))
            else:
                outputs.append(self._fail_not_finite(request, batch, f"latent at step {batch.num_done}"))
        if batch.num_done == batch.num_steps and self._left(batch):
            outputs += self._finish(batch, batch.pixels())
        if not self._left(batch):
            self._end_batch()
        return outputs

    def _finish(self, batch: ImageBatch, pixels: Tensor) -> list[ImageOutput]:
        """The last outputs of the pictures that are left; pixels are [B, 3, H, W]."""
        outputs = []
        for request, own in zip(batch.requests, pixels, strict=True):
            if request.lifecycle.terminal is not None:
                continue
            if not bool(torch.isfinite(own).all()):
                outputs.append(self._fail_not_finite(request, batch, "picture that the VAE decoded"))
                continue
            event = request.lifecycle.finish(FinishReason.STOP)
            outputs.append(self._end(request, event, batch.num_done, to_image(own)))
        return outputs

    def _fail_not_finite(self, request: ImageRequest, batch: ImageBatch, what: str) -> ImageOutput:
        error = RequestError(
            f"the {what} is not finite for the mixture '{request.mixture}' at guidance {request.params.guidance:g}; "
            "lower the weights or the guidance, or run in float32"
        )
        return self._end(request, request.lifecycle.fail(error), batch.num_done)

    def _end(
        self,
        request: ImageRequest,
        event: TerminalEvent,
        num_done: int = 0,
        image: Image.Image | None = None,
    ) -> ImageOutput:
        del self._open[_key(request)]
        picture = Picture(
            *_key(request),
            request.prompt,
            request.params,
            request.mixture,
            self.base.path,
            event,
            image,
            {name: self._identities[name] for name in request.mixture.names if name in self._identities},
        )
        return ImageOutput(*_key(request), num_done, len(request.timesteps), picture)

    def _identity(self, name: str) -> AdapterId | None:
        try:
            return self._library.identity(self._library.locate(name))
        except AdapterError:  # removed in this very moment; the batch holds what it needs
            return None

    def _abandon(self, error: Exception) -> None:
        for request in list(self._open.values()):
            if request.lifecycle.state is RequestState.RUNNING:
                self._end(request, request.lifecycle.fail(error))
        self._end_batch()

    def _left(self, batch: ImageBatch) -> list[ImageRequest]:
        return [request for request in batch.requests if request.lifecycle.terminal is None]

    def _end_batch(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def _finish_all(
        self, wanted: set[PictureKey], on_output: Callable[[ImageOutput], None] | None
    ) -> dict[PictureKey, Picture]:
        """Step until these pictures have ended."""
        done: dict[PictureKey, Picture] = {}
        while len(done) < len(wanted):
            for output in self.step():
                key = (output.request_id, output.index)
                if key not in wanted:
                    continue
                if on_output is not None:
                    on_output(output)
                if output.picture is not None:
                    done[key] = output.picture
        return done


def _key(request: ImageRequest) -> PictureKey:
    return request.request_id, request.index
