"""Where the adapters of pictures hang: one module whose paths are the sites that adapters of a pipeline name."""

from collections.abc import Sequence

from torch import nn

from manylora.errors import AdapterError, CapacityError, ManyLoraError
from manylora.image.request import ImageRequest
from manylora.lora.components import TEXT_ENCODERS
from manylora.models.attach import Attached
from manylora.models.diffusion_base import DiffusionBase


class DiffusionModel(nn.Module):
    """UNet and text encoders of a base, named as `lora.components` does: never run itself, it only names.

    So an adapter with parts for the text encoders is attached as one thing, with one identity, in one pool.
    """

    def __init__(self, base: DiffusionBase) -> None:
        super().__init__()
        for name, module in base.unet.named_children():
            self.add_module(name, module)
        for name, encoder in zip(TEXT_ENCODERS, base.text_encoders, strict=False):
            # transformers 5 has no `text_model` in its CLIPTextModel; files have it.
            self.add_module(
                name, encoder if hasattr(encoder, "text_model") else nn.ModuleDict({"text_model": encoder})
            )


def fitting(
    lora: Attached, requests: Sequence[ImageRequest]
) -> tuple[list[ImageRequest], list[tuple[ImageRequest, ManyLoraError]]]:
    """Part pictures whose mixtures can run together from those that cannot run at all, which are given the reason.

    Neither has those that fit no more beside the others before them: their turn comes in another batch. What can run
    is read on the way, and stays in the pool.
    """
    if _fit_together(lora, requests):
        return list(requests), []
    refused: list[tuple[ImageRequest, ManyLoraError]] = []
    fit: list[ImageRequest] = []
    for request in requests:
        try:
            with lora.rows([request.mixture]):
                pass
        except (AdapterError, CapacityError) as error:
            refused.append((request, error))
            continue
        if _fit_together(lora, [*fit, request]):
            fit.append(request)
    return fit, refused


def _fit_together(lora: Attached, requests: Sequence[ImageRequest]) -> bool:
    try:
        with lora.rows([request.mixture for request in requests]):
            return True
    except (AdapterError, CapacityError):
        return False
