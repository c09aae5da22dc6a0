"""Several mixtures of some adapters over the same texts, in one flat batch, through the kernels that serve them."""

# Shapes: M mixtures, P tokens of all texts, V vocabulary. Rows are mixture by mixture, each with all texts, so that
# the rows of an adapter stand together.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.fit import check_fits
from manylora.models.adapter_pages import AdapterPages
from manylora.models.dense_attention import DenseAttention
from manylora.models.llama import Llama
from manylora.models.lora_batch import Item, LoraBatchBuilder, WeightedAdapters
from manylora.models.sites import base_sites
from manylora.models.stacked_lora import StackedLora, decoder_stacks

PAGE_BYTES = 1 << 16
"""Or the longest rank row, if that is longer."""


class SideBySide:
    """A decoder and adapters in pages of their own; keeps no cache between calls."""

    def __init__(self, model: Llama, adapters: Sequence[Adapter]) -> None:
        """
        Raises:
            AdapterMismatchError: an adapter does not fit the model.
        """
        sites, stacks = base_sites(model.config), decoder_stacks(model.config)
        for adapter in adapters:
            check_fits(adapter, sites, model.config.name)
        longest_row = max(max(size) for size in sites.values()) * torch.float32.itemsize
        page_bytes = max(PAGE_BYTES, longest_row)
        no_pages = torch.empty(0, page_bytes, dtype=torch.uint8)
        by_identity = {adapter.identity: adapter for adapter in adapters}
        images = [AdapterPages(no_pages, stacks).layout(adapter) for adapter in by_identity.values()]
        num_pages = sum(image.num_pages for image in images)
        pool = AdapterPages(
            torch.empty(num_pages, page_bytes, dtype=torch.uint8, device=model.device), stacks
        )
        self._model = model
        self._identities = [adapter.identity for adapter in adapters]
        self._resident = {}
        first = 0
        for image in images:
            self._resident[image.identity] = pool.write(image, range(first, first + image.num_pages))
            first += image.num_pages
        self._builder = LoraBatchBuilder(pool.pages, stacks)

    @torch.inference_mode()
    def logits(
        self, texts: Sequence[Sequence[int]], mixtures: Sequence[Sequence[float]]
    ) -> Tensor:  # [M, P, V]
        """Return every mixture's logits at every token of every text.

        Args:
            texts: token ids; none empty.
            mixtures: [M, adapters], the weight of each adapter in each mixture; all zero is the base.
        """
        device = self._model.device
        lengths = [len(text) for text in texts]
        num_tokens = sum(lengths)
        items = [
            Item(m * num_tokens, (m + 1) * num_tokens, self._weighted(weights))
            for m, weights in enumerate(mixtures)
        ]
        batch = self._builder.build([item for item in items if item.mixture], self._resident)
        attention = DenseAttention(lengths * len(mixtures), scale=self._model.config.attention_scale)
        logits: Tensor = self._model(
            torch.tensor([token for text in texts for token in text], device=device).repeat(len(mixtures)),
            attention.positions.to(device),
            attention,
            None if batch is None else StackedLora(batch, self._model.config),
        )
        return logits.view(len(mixtures), num_tokens, -1)

    def _weighted(self, weights: Sequence[float]) -> WeightedAdapters:
        """By identity: two adapters of one content are one, with the sum of their weights."""
        total: dict[AdapterId, float] = {}
        for identity, weight in zip(self._identities, weights, strict=True):
            total[identity] = total.get(identity, 0.0) + weight
        return tuple((identity, weight) for identity, weight in total.items() if weight)
