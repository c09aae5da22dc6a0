"""From what the scheduler decided to the tensors of one forward pass."""

# Shapes: T new tokens of all sequences, N sequences, P pages of the longest.

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manylora.kernels import PagedSequences
from manylora.lora.adapter import AdapterId
from manylora.models.adapter_pages import ResidentAdapter
from manylora.models.lora_batch import Item, LoraBatch, LoraBatchBuilder, WeightedAdapters
from manylora.text.scheduler import Scheduled


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass. Sequences with the same mixture stand together, so that an adapter's rows are consecutive."""

    scheduled: list[Scheduled]  # N, in row order
    tokens: Tensor  # [T]  int64
    positions: Tensor  # [T]  int64
    slot_page: Tensor  # [T]  int64, page that receives each token's KV
    slot_index: Tensor  # [T]  int64, its place in that page
    sequences: PagedSequences
    sampled: list[Scheduled]  # those whose next token is due, in row order
    logit_rows: Tensor  # [len(sampled)]  int64
    lora: LoraBatch | None

    @property
    def num_adapters(self) -> int:
        """Distinct adapters in this pass."""
        return len({identity for s in self.scheduled for identity, _ in s.sequence.mixture or ()})


def build_batch(
    scheduled: SequenceOf[Scheduled],
    resident: Mapping[AdapterId, ResidentAdapter],
    lora: LoraBatchBuilder,
    device: torch.device,
) -> Batch:
    """Make the tensors of a step. Every adapter named must be resident."""
    ordered = _by_mixture(scheduled, resident)
    lengths = np.array([s.num_new for s in ordered])
    ends = np.cumsum(lengths)
    begins = ends - lengths
    pages, indices, positions, tokens = [], [], [], []
    for s in ordered:
        first, last = s.sequence.num_computed, s.sequence.num_computed + s.num_new
        page, index = s.sequence.block_table.slots(first, last)
        pages.append(page)
        indices.append(index)
        positions.append(np.arange(first, last))
        tokens.append(np.array(s.sequence.tokens[first:last]))

    def rows(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    items = [
        Item(int(begin), int(end), s.sequence.mixture or ())
        for s, begin, end in zip(ordered, begins, ends, strict=True)
    ]
    return Batch(
        scheduled=ordered,
        tokens=rows(tokens),
        positions=rows(positions),
        slot_page=rows(pages),
        slot_index=rows(indices),
        sequences=_paged(ordered, ends, device),
        sampled=[s for s in ordered if s.samples],
        logit_rows=rows([ends[[s.samples for s in ordered]] - 1]),
        lora=lora.build(items, resident),
    )


def _paged(ordered: list[Scheduled], ends: np.ndarray, device: torch.device) -> PagedSequences:
    longest = max(len(s.sequence.block_table.pages) for s in ordered)
    block_table = np.full((len(ordered), longest), -1, dtype=np.int32)
    for row, s in zip(block_table, ordered, strict=True):
        row[: len(s.sequence.block_table.pages)] = s.sequence.block_table.pages
    context = np.array([s.sequence.num_computed + s.num_new for s in ordered], dtype=np.int32)
    return PagedSequences(
        block_table=torch.from_numpy(block_table).to(device),
        query_start=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device),
        context_len=torch.from_numpy(context).to(device),
    )


def _by_mixture(
    scheduled: SequenceOf[Scheduled], resident: Mapping[AdapterId, ResidentAdapter]
) -> list[Scheduled]:
    """Order sequences so that kernels find equal work side by side.

    Equal mixtures together; among those, adapters of one size with equally many rows together, since such segments are
    one batched product.
    """
    groups: dict[WeightedAdapters, list[Scheduled]] = {}
    for s in scheduled:
        groups.setdefault(s.sequence.mixture or (), []).append(s)

    def kind(mixture: WeightedAdapters) -> tuple[int, int, int, WeightedAdapters]:
        num_rank_rows = sum(len(resident[identity].row_offset) for identity, _ in mixture)
        return len(mixture), num_rank_rows, sum(s.num_new for s in groups[mixture]), mixture

    return [s for mixture in sorted(groups, key=kind) for s in groups[mixture]]
