"""What multi-LoRA adds to a model, on tensors alone: LoRA products from paged rank rows, and paged attention.

Knows no adapter, request or configuration: which rows use what, and where it lies, comes as index records
(`Segments`, `RankRows`, `PagedSequences`). `reference` says what each operation means; the other backends are faster.
"""

from manylora.kernels.kv import KvLayout, PagedSequences
from manylora.kernels.ops import (
    add_lora,
    available_backends,
    lora_expand,
    lora_shrink,
    paged_attention,
    place_rows,
    write_kv,
)
from manylora.kernels.page_memory import page_memory
from manylora.kernels.segments import (
    FLOAT_ROW_DTYPES,
    ROW_DTYPES,
    PlacedRows,
    RankRows,
    Segments,
    SiteRows,
    StackRows,
    StepRows,
    bytes_of_row,
    hidden_layout,
)

__all__ = [
    "FLOAT_ROW_DTYPES",
    "ROW_DTYPES",
    "bytes_of_row",
    "Segments",
    "RankRows",
    "SiteRows",
    "StackRows",
    "StepRows",
    "hidden_layout",
    "KvLayout",
    "PagedSequences",
    "available_backends",
    "lora_shrink",
    "lora_expand",
    "add_lora",
    "write_kv",
    "paged_attention",
    "PlacedRows",
    "place_rows",
    "page_memory",
]
