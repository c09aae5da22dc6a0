"""How the adapters of a batch map onto a decoder: its sites by stack, and the hook that it calls for each."""

from torch import Tensor

from manylora.models.config import LlamaConfig
from manylora.models.lora_batch import LoraBatch
from manylora.models.sites import Stack, site_name, stack_shape


def decoder_stacks(config: LlamaConfig) -> list[tuple[str, ...]]:
    """The sites of a decoder by the stack they belong to: stack `layer * len(Stack) + i` is layer's i-th."""
    return [
        tuple(site_name(layer, member) for member in stack.members)
        for layer in range(config.num_layers)
        for stack in Stack
    ]


class StackedLora:
    """The LoRA of a batch as the decoder asks for it, per stack of a layer: an `llama.LoraHook`."""

    def __init__(self, lora: LoraBatch, config: LlamaConfig) -> None:
        self.batch = lora
        self._columns = {stack: stack_shape(config, stack).columns for stack in Stack}
        self._order = {stack: i for i, stack in enumerate(Stack)}

    def shrink_expand(self, layer: int, stack: Stack, x: Tensor, y: Tensor) -> None:
        self.batch.apply(layer * len(self._order) + self._order[stack], x, y, self._columns[stack])
