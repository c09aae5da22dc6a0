"""Multi-LoRA on any torch module: each row of a batch runs its own mixture, and the base weights are never touched.

    library = manylora.Library("adapters/")
    with manylora.attach(model, library) as lora, torch.inference_mode():
        with lora.rows(["alice", {"lcm": 1.0, "papercut": 0.8}, None]):
            y = model(x)                      # row i of x runs mixture i

Every Linear and Conv2d is a site. A hook adds the LoRA to what the module returns, through the same kernels and the
same paged memory as the text engine.
"""

# Shapes: N items (rows of the batch), P rows of activations per item (tokens, patches), D in-features, O out-features.

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manylora.errors import AdapterMismatchError, CapacityError, ConfigError
from manylora.kernels import page_memory
from manylora.lora.adapter import Adapter, AdapterId
from manylora.lora.fit import check_fits
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.lora.reader import AdapterRef
from manylora.memory.unified import UnifiedMemory
from manylora.models.adapter_pages import AdapterPages, ResidentAdapter
from manylora.models.lora_batch import Item, LoraBatch, LoraBatchBuilder, WeightedAdapters

PAGE_BYTES = 64 * 1024
"""Pages hold rank rows only, so their size is free: small ones waste little on small adapters."""

WIDEST_ITEMSIZE = 4
"""Bytes of the widest dtype an adapter may have."""


def attach(
    model: nn.Module, library: Library, *, memory_bytes: int = 256 << 20, name: str | None = None
) -> "Attached":
    """Let a model run a mixture of the library's adapters for each row of its batch.

    For inference: gradients do not flow through the adapters.

    Args:
        model: any module; its Linear and Conv2d submodules are the sites. It stays as it is until `rows` is entered,
            and again after.
        library: where the names in mixtures are looked up.
        memory_bytes: of the pool, on the model's device. The adapters of one `rows` must fit; others stay in it until
            their pages are needed.
        name: what messages call the model; its class by default.
    """
    return Attached(model, library, memory_bytes, name or type(model).__name__)


class Attached:
    """What `attach` returns. One thread at a time may use it, as with the model itself."""

    def __init__(self, model: nn.Module, library: Library, memory_bytes: int, name: str) -> None:
        self._library = library
        self._name = name
        self._modules = _site_modules(model)
        if not self._modules:
            raise ConfigError(
                f"{self._name} has no Linear and no Conv2d, so no adapter can be attached to it"
            )
        self._shapes = {site: _shape(module) for site, module in self._modules.items()}
        longest = max(max(shape) for shape in self._shapes.values()) * WIDEST_ITEMSIZE
        page_bytes = max(PAGE_BYTES, -(-longest // 128) * 128)
        num_pages = memory_bytes // page_bytes
        if num_pages < 1:
            raise ConfigError(
                f"memory_bytes must be at least one page of {page_bytes} bytes, got {memory_bytes}"
            )
        device = next(model.parameters()).device
        pool = page_memory(num_pages, page_bytes, device)
        stacks = [(site,) for site in self._modules]
        self._memory = UnifiedMemory(num_pages, page_tokens=1, prefix_caching=False)
        self._pages = AdapterPages(pool, stacks)
        self._builder = LoraBatchBuilder(pool, stacks)
        self._resident: dict[AdapterId, ResidentAdapter] = {}
        self._rows: _Rows | None = None
        self._hooks = [
            module.register_forward_hook(self._hook(stack, site), with_kwargs=True)
            for stack, (site, module) in enumerate(self._modules.items())
        ]

    @property
    def sites(self) -> tuple[str, ...]:
        """Every module path that an adapter may name."""
        return tuple(self._modules)

    @contextmanager
    def rows(self, mixtures: Sequence[MixtureLike], *, copies: int = 1) -> Iterator[None]:
        """Run the model's rows with these mixtures while the context is open.

        Args:
            mixtures: one per row: a name, {name: weight}, "a:1+b:0.5", or None for the base.
            copies: how often the batch is repeated as a whole. Classifier-free guidance that runs [uncond, cond] as
                one batch of 2 N rows has 2: then row i and row N + i run mixture i.
        Raises:
            RequestError, AdapterNotFoundError, AdapterFormatError, AdapterMismatchError: a mixture that cannot be run.
            CapacityError: the adapters named do not fit the memory together.
            ConfigError: `rows` inside `rows`; or, while the model runs, a batch of another size.
        """
        if self._rows is not None:
            raise ConfigError("rows() is open already; one batch at a time")
        if not self._hooks:
            raise ConfigError("the adapters have been detached; call attach() again")
        if copies < 1:
            raise ConfigError(f"copies must be at least 1, got {copies}")
        parsed = [Mixture.parse(mixture) for mixture in mixtures]
        held: list[AdapterId] = []
        try:
            weighted = [self._resolve(mixture, held) for mixture in parsed]
            self._rows = _Rows(weighted * copies, len(mixtures), self._builder, self._resident)
            yield
        finally:
            self._rows = None
            for identity in held:
                self._memory.adapters.release(identity)

    def detach(self) -> None:
        """Take the hooks away. The model is as it was before `attach`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _resolve(self, mixture: Mixture, held: list[AdapterId]) -> WeightedAdapters:
        """Make a mixture's adapters resident and hold them; what is held is added to `held` at once."""
        weights: dict[AdapterId, float] = {}
        for name, weight in mixture.weights:
            identity = self._make_resident(self._library.locate(name))
            self._memory.adapters.acquire(identity)
            held.append(identity)
            weights[identity] = weights.get(identity, 0.0) + weight
        return tuple(sorted(weights.items()))

    def _make_resident(self, ref: AdapterRef) -> AdapterId:
        cache = self._memory.adapters
        identity = self._library.identity(ref)
        if identity is not None and cache.pages(identity) is not None:
            return identity
        adapter = self._library.load(ref)
        self._check(adapter)
        identity = adapter.identity
        if cache.pages(identity) is None:
            image = self._pages.layout(adapter)
            if not self._memory.can_alloc(image.num_pages):
                raise CapacityError(
                    f"{adapter.label} takes {image.num_pages} pages of {self._pages.page_bytes} bytes beside those "
                    f"of the same rows(), but only {self._memory.num_free + self._memory.num_evictable} of "
                    f"{self._memory.pool.num_pages} can be had; give attach() more memory_bytes"
                )
            pages = self._memory.alloc(image.num_pages)
            self._resident = {i: r for i, r in self._resident.items() if cache.pages(i) is not None}
            try:
                self._resident[identity] = self._pages.write(image, pages)
            except BaseException:
                self._memory.pool.free(pages)
                raise
            cache.insert(identity, pages)
            cache.mark_ready(identity)
        return identity

    def _check(self, adapter: Adapter) -> None:
        check_fits(adapter, self._shapes, self._name)
        for site, pair in adapter.sites.items():
            module = self._modules[site]
            expected = module.kernel_size if isinstance(module, nn.Conv2d) else None
            if pair.kernel_size != expected:
                raise AdapterMismatchError(
                    f"{adapter.label}, site '{site}': expected a kernel of {expected}, got {pair.kernel_size}"
                )
            if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
                raise AdapterMismatchError(
                    f"{adapter.label} names '{site}', a Conv2d with groups={module.groups} and "
                    f"padding_mode='{module.padding_mode}'; only groups=1 with zeros can carry a LoRA here"
                )

    def _hook(self, stack: int, site: str) -> Any:
        def add_lora(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if self._rows is None or not self._rows.touches(stack):
                return None
            x = args[0] if args else kwargs["input"]
            self._rows.check(site, x, output)
            if isinstance(module, nn.Conv2d):
                return self._rows.add_to_conv(stack, module, x, output)
            return self._rows.add_to_linear(stack, x, output)

        return add_lora


class _Rows:
    """The mixtures of one open `rows`, and the batches made from them."""

    def __init__(
        self,
        mixtures: list[WeightedAdapters],
        num_rows: int,
        builder: LoraBatchBuilder,
        resident: Mapping[AdapterId, ResidentAdapter],
    ) -> None:
        self._mixtures = mixtures
        self._num_rows = num_rows
        self._builder = builder
        self._resident = dict(resident)
        self._batches: dict[int, LoraBatch | None] = {}  # by activation rows per item
        self._any = self._batch(1)

    def touches(self, stack: int) -> bool:
        return self._any is not None and self._any.touches(stack)

    def check(self, site: str, x: Tensor, output: Tensor) -> None:
        if output.dim() < 2 or x.dim() != output.dim():
            raise ConfigError(
                f"'{site}' was given {list(x.shape)} without a batch dimension; its rows cannot be told apart"
            )
        if x.shape[0] != len(self._mixtures):
            copies = len(self._mixtures) // max(1, self._num_rows)
            raise ConfigError(
                f"'{site}' was given a batch of {x.shape[0]}, but rows() has {self._num_rows} mixtures"
                + (f" x {copies} copies" if copies > 1 else "")
                + "; if the model runs the batch several times over (guidance), say so with rows(..., copies=2)"
            )
        if output.requires_grad:
            raise ConfigError(
                f"'{site}' records gradients, but none flow through attached adapters; run under "
                "torch.inference_mode() or torch.no_grad(), and train LoRAs with PEFT"
            )

    def add_to_linear(self, stack: int, x: Tensor, output: Tensor) -> Tensor:
        rows = output.reshape(-1, output.shape[-1])  # [N * P, O]
        self._apply(stack, x.reshape(-1, x.shape[-1]), rows)
        return rows.view(output.shape)

    def add_to_conv(self, stack: int, conv: nn.Conv2d, x: Tensor, output: Tensor) -> Tensor:
        # A LoRA of a conv is a conv to `rank` channels and a 1x1 conv back: a Linear on its patches.
        padded = F.pad(x, conv._reversed_padding_repeated_twice)
        patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)  # [N, D, P]
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])  # [N * P, D]
        delta = torch.zeros(len(rows), output.shape[1], dtype=output.dtype, device=output.device)
        self._apply(stack, rows, delta)
        return output + delta.view(len(x), -1, output.shape[1]).transpose(1, 2).view_as(output)

    def _apply(self, stack: int, x: Tensor, y: Tensor) -> None:
        batch = self._batch(len(x) // len(self._mixtures))
        assert batch is not None, "a site is touched though every row runs the base"
        batch.apply(stack, x, y, [(0, y.shape[1])])

    def _batch(self, rows_per_item: int) -> LoraBatch | None:
        if rows_per_item not in self._batches:
            items = [
                Item(i * rows_per_item, (i + 1) * rows_per_item, mixture)
                for i, mixture in enumerate(self._mixtures)
            ]
            self._batches[rows_per_item] = self._builder.build(items, self._resident)
        return self._batches[rows_per_item]


def _site_modules(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every Linear and Conv2d by its path, but those of which only the weights are used: no hook sees them run."""
    unseen = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in unseen
    }


def _shape(module: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """(in, out) features; of a conv the in-features are those of a patch."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    height, width = module.kernel_size
    return module.in_channels // module.groups * height * width, module.out_channels
