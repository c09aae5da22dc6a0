"""manylora: thousands of LoRA adapters, and weighted mixtures of them, on one base model.

    Library   adapters by name                     Engine       text, every request its own mixture
    attach    the same for any torch module        ImageEngine  pictures, each its own mixture
    compose   several adapters made into one file

Importing this module imports neither torch nor transformers; a name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manylora.version import __version__

if TYPE_CHECKING:
    from manylora.image.config import ImageEngineConfig
    from manylora.image.engine import ImageEngine
    from manylora.image.output import Picture
    from manylora.image.params import ImageParams
    from manylora.lora.adapter import Adapter, LoraPair
    from manylora.lora.components import components
    from manylora.lora.compose import Composition, compose
    from manylora.lora.convert import load_adapter, save_adapter
    from manylora.lora.formats import load_peft, save_peft
    from manylora.lora.library import Library
    from manylora.lora.mixture import Mixture
    from manylora.models.attach import Attached, attach
    from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
    from manylora.models.loading import load_model
    from manylora.models.tokenizer import load_tokenizer
    from manylora.text.config import EngineConfig
    from manylora.text.engine import Engine
    from manylora.text.output import Completion, Output
    from manylora.text.params import SamplingParams

_HOME = {
    "Adapter": "lora.adapter",
    "LoraPair": "lora.adapter",
    "Mixture": "lora.mixture",
    "Library": "lora.library",
    "load_adapter": "lora.convert",
    "save_adapter": "lora.convert",
    "load_peft": "lora.formats",
    "save_peft": "lora.formats",
    "components": "lora.components",
    "compose": "lora.compose",
    "Composition": "lora.compose",
    "attach": "models.attach",
    "Attached": "models.attach",
    "load_model": "models.loading",
    "load_tokenizer": "models.tokenizer",
    "Engine": "text.engine",
    "EngineConfig": "text.config",
    "SamplingParams": "text.params",
    "Completion": "text.output",
    "Output": "text.output",
    "DiffusionBase": "models.diffusion_base",
    "load_diffusion_base": "models.diffusion_base",
    "ImageEngine": "image.engine",
    "ImageEngineConfig": "image.config",
    "ImageParams": "image.params",
    "Picture": "image.output",
}
"""Where each public name lives."""

__all__ = [
    "Adapter",
    "LoraPair",
    "Mixture",
    "Library",
    "load_adapter",
    "save_adapter",
    "load_peft",
    "save_peft",
    "components",
    "compose",
    "Composition",
    "attach",
    "Attached",
    "load_model",
    "load_tokenizer",
    "Engine",
    "EngineConfig",
    "SamplingParams",
    "Completion",
    "Output",
    "DiffusionBase",
    "load_diffusion_base",
    "ImageEngine",
    "ImageEngineConfig",
    "ImageParams",
    "Picture",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'manylora' has no attribute '{name}'")
    return getattr(import_module(f"manylora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
