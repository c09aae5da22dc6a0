"""A tiny Llama in transformers' layout, and a job on it. Real enough for every contender, small enough for seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manylora.bench.adapters import write_adapters
from manylora.bench.text.contender import Job
from manylora.bench.text.workload import Distribution, Trace, make_trace
from manylora.models.loading import load_config
from manylora.models.sites import base_sites

NUM_ADAPTERS = 5
RANKS = (2, 5)


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """Contenders set torch's threads, as a process of their own may."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Weights this large make the logits of two tokens differ clearly, so that greedy answers are well defined.
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapters_folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder, base_sites(load_config(tiny_model)), NUM_ADAPTERS, RANKS, seed=3, strength=0.5)
    return folder


def trace_of(num_requests: int, *, num_named: int = 1, distribution: str = "distinct") -> Trace:
    return make_trace(
        num_requests=num_requests,
        prompt_tokens=7,
        output_tokens=6,
        vocab_size=101,
        num_adapters=NUM_ADAPTERS,
        distribution=Distribution.parse(distribution),
        num_named=num_named,
        seed=11,
    )


def job_of(tiny_model: str, adapters_folder: Path, trace: Trace, *, resident: bool = False) -> Job:
    return Job(
        model=tiny_model,
        dtype="float32",
        threads=1,
        adapters_folder=str(adapters_folder),
        max_batch=4,
        pool_bytes=8 << 20,
        resident=resident,
        trace=trace,
    )
