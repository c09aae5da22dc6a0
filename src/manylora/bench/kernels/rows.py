"""What a decoder computes row by row - RMSNorm, rotary embedding, gated unit - and its dense products.

Every call is on other activations, or on the weights of another layer.
"""

# Shapes: T rows, D in-features, O out-features; of a stack of sites where products are meant.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.bench.kernels.case import Arm, Case, Work, filled, num_sets
from manylora.bench.kernels.config import KernelsConfig
from manylora.kernels import available_backends, native, ops
from manylora.kernels.native.int8 import round_weight
from manylora.models.config import LlamaConfig
from manylora.models.layers import BaseProduct
from manylora.models.rope import Rotation, inverse_frequencies
from manylora.models.sites import Stack, stack_shape


def row_cases(config: KernelsConfig, model: LlamaConfig, working_set_bytes: int) -> Iterator[Case]:
    """The kernels on rows, on every number of rows in `config.rows`."""
    kinds = {"rms_norm": _rms_norm, "rope": _rope, "gated_unit": _gated_unit}
    for kernel, make in kinds.items():
        for T in config.rows if kernel in config.kernels else ():
            yield make(model, T, working_set_bytes, config.seed)


def _rms_norm(model: LlamaConfig, T: int, working_set_bytes: int, seed: int) -> Case:
    D = model.hidden_size
    x, delta = _sets(T, (2, D), working_set_bytes, seed).unbind(2)
    xs, deltas, weight = x.unbind(0), delta.unbind(0), torch.rand(D) + 0.5

    def call(i: int, backend: str) -> Tensor:
        return ops.add_rms_norm(xs[i], deltas[i], weight, model.rms_norm_eps, backend=backend)

    def answer(backend: str) -> Tensor:
        return ops.add_rms_norm(xs[0].clone(), deltas[0], weight, model.rms_norm_eps, backend=backend)

    # x and delta read, x written; y is small and written to memory that was just given back, so it stays in cache.
    return Case("rms_norm", str(T), Work(3 * 4 * T * D, 5 * T * D), _arms(call, answer, len(xs)))


def _rope(model: LlamaConfig, T: int, working_set_bytes: int, seed: int) -> Case:
    heads = model.num_heads + model.num_kv_heads
    xs = _sets(T, (heads, model.head_dim), working_set_bytes, seed).unbind(0)
    rotation = Rotation.at(
        torch.arange(1, T + 1), inverse_frequencies(model.rope, model.head_dim), torch.float32
    )

    def call(i: int, backend: str) -> None:
        ops.rotate(xs[i], rotation.cos, rotation.sin, backend=backend)

    def answer(backend: str) -> Tensor:
        x = xs[0].clone()
        ops.rotate(x, rotation.cos, rotation.sin, backend=backend)
        return x

    size = xs[0].numel()
    return Case("rope", str(T), Work(2 * 4 * size, 3 * size), _arms(call, answer, len(xs)))


def _gated_unit(model: LlamaConfig, T: int, working_set_bytes: int, seed: int) -> Case:
    D = model.intermediate_size
    xs = _sets(T, (2 * D,), working_set_bytes, seed).unbind(0)

    def call(i: int, backend: str) -> Tensor:
        return ops.silu_mul(xs[i], backend=backend)

    # gate and up read; y as in _rms_norm. The exponential counts as one operation.
    work = Work(2 * 4 * T * D, 5 * T * D)
    return Case("gated_unit", str(T), work, _arms(call, partial(call, 0), len(xs)))


def _arms(
    call: Callable[[int, str], object], answer: Callable[[str], Tensor], count: int
) -> dict[str, Arm]:
    backends = {"ours": available_backends()[0], "torch": "grouped"}
    return {
        name: Arm(partial(_swapped, call, backend), count, partial(answer, backend))
        for name, backend in backends.items()
    }


def _swapped(call: Callable[[int, str], object], backend: str, i: int) -> None:
    call(i, backend)


def _sets(T: int, shape: tuple[int, ...], working_set_bytes: int, seed: int) -> Tensor:
    """As many [T, *shape] of normal values as are the working set. -> [sets, T, *shape]"""
    size = T
    for extent in shape:
        size *= extent
    count = num_sets(working_set_bytes, 4 * size)
    return filled(4 * count * size, seed).view(torch.float32).view(count, T, *shape)


def product_cases(config: KernelsConfig, model: LlamaConfig, working_set_bytes: int) -> Iterator[Case]:
    """The base products of a layer in float32, and on eight-bit integers where the native kernels are there."""
    if "product" in config.kernels:
        float_arms = _float_products(model, working_set_bytes, config.seed)
        for T in config.rows:
            yield _product_case("product", model, T, float_arms, itemsize=4)
        del float_arms
    if "int8_product" in config.kernels and native.AVAILABLE:
        int8_arms = _int8_products(model, working_set_bytes, config.seed)
        for T in config.rows:
            # Nothing here says what a processor can do with integers; torch's product is what others reach.
            case = _product_case("int8_product", model, T, int8_arms, itemsize=1)
            # Ours rounds activations with a scale for 32 inputs, or not at all; torch with one a row. 0.015 apart.
            yield replace(case, rate_of="torch", max_disagreement=0.02)


Products = list[list[Callable[[Tensor], Tensor]]]
"""Of each set, a product for each stack of a layer."""


def _product_case(
    kernel: str, model: LlamaConfig, T: int, products: dict[str, Products], itemsize: int
) -> Case:
    shapes = [stack_shape(model, stack) for stack in Stack]
    generator = torch.Generator().manual_seed(T)
    inputs = [torch.randn(T, shape.in_features, generator=generator) for shape in shapes]
    num_weights = sum(shape.in_features * shape.out_features for shape in shapes)
    arms = {name: _product_arm(sets, inputs) for name, sets in products.items()}
    return Case(kernel, str(T), Work(num_weights * itemsize, 2 * T * num_weights, T), arms)


def _product_arm(sets: Products, inputs: list[Tensor]) -> Arm:
    def call(i: int) -> list[Tensor]:
        return [product(x) for product, x in zip(sets[i], inputs, strict=True)]

    return Arm(call, len(sets), lambda: torch.cat([y.flatten() for y in call(0)]))


def _float_products(model: LlamaConfig, working_set_bytes: int, seed: int) -> dict[str, Products]:
    weights = _weights(model, seed)
    count = num_sets(working_set_bytes, sum(weight.nbytes for weight in weights))
    return {
        "ours": [[_ours(weight) for weight in weights] for _ in range(count)],
        "torch": [[partial(_linear, weight.clone()) for weight in weights] for _ in range(count)],
    }


def _ours(weight: Tensor, *, int8: bool = False) -> BaseProduct:
    O, D = weight.shape  # noqa: E741  the letters of the shape legend
    product = BaseProduct(D, O, bias=False, dtype=torch.float32, device=torch.device("cpu"))
    assert product.weight is not None
    product.weight.copy_(weight)
    product.finish(int8=int8)
    return product


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _int8_products(model: LlamaConfig, working_set_bytes: int, seed: int) -> dict[str, Products]:
    """torch's product of integers rounds activations too, with one scale a row."""
    weights = _weights(model, seed)
    rounded = [round_weight(weight) for weight in weights]
    count = num_sets(working_set_bytes, sum(weight.numel() for weight in weights))
    return {
        "ours": [[_ours(weight, int8=True) for weight in weights] for _ in range(count)],
        "torch": [
            [partial(_int_mm, integers.to(torch.int8), scale) for integers, scale in rounded]
            for _ in range(count)
        ],
    }


def _int_mm(weight: Tensor, weight_scale: Tensor, x: Tensor) -> Tensor:
    """weight: [O, D] int8, weight_scale: [O], x: [T, D] -> [T, O]."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    product = torch._int_mm((x / scale).round().to(torch.int8), weight.T)
    return product * scale * weight_scale


def _weights(model: LlamaConfig, seed: int) -> list[Tensor]:
    """A random weight [O, D] for each stack of a layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [stack_shape(model, stack) for stack in Stack]
    return [
        torch.randn(shape.out_features, shape.in_features, generator=generator) / shape.in_features**0.5
        for shape in shapes
    ]
