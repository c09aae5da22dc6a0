"""The same weights and adapters in the files that a peer reads; models are kept, beside the peers' environments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from manylora.bench.peers.environment import environment_folder
from manylora.bench.peers.gguf import write_adapter, write_model
from manylora.bench.peers.table import PEERS
from manylora.bench.text.contender import ADAPTER_GGUF, Job
from manylora.errors import ConfigError
from manylora.models.convert import save_hf
from manylora.models.loading import INT8, load_config
from manylora.models.locate import ModelFiles, locate

PEER_DTYPE = "float32"
"""What peers compute in where we compute in int8."""


def job_of_peer(name: str, job: Job) -> Job:
    """The job as this peer is given it; writes the files that it wants and that are not there yet.

    Raises:
        ConfigError: the peer reads no model of this kind.
    """
    peer = PEERS[name]
    job = replace(job, dtype=PEER_DTYPE) if job.dtype == INT8 else job
    if peer.model_form == "transformers":
        return replace(job, model=str(transformers_folder(job.model)))
    if peer.model_form in ("gguf-f32", "gguf-q8_0"):
        _write_gguf_adapters(job)
        return replace(job, model=str(_gguf_file(name, job.model, peer.model_form.removeprefix("gguf-"))))
    return job


def _write_gguf_adapters(job: Job) -> None:
    """Beside the PEFT files of each adapter, for all peers that read them."""
    config = load_config(job.model)
    for number in job.trace.adapters:
        folder = job.adapter_folder(number)
        if not (folder / ADAPTER_GGUF).is_file():
            write_adapter(folder, folder / ADAPTER_GGUF, config)


def transformers_folder(model: str) -> Path:
    """The model's own folder, or for a GGUF file one of the same weights in float32."""
    files = locate(model)
    if files.gguf is None:
        return files.directory
    return _kept(files, "transformers", lambda target: save_hf(model, target))


def _gguf_file(name: str, model: str, kind: str) -> Path:
    files = locate(model)
    if files.gguf is None:
        raise ConfigError(f"peer '{name}' reads GGUF files; '{model}' is a transformers folder")
    source = files.gguf
    return _kept(files, f"{kind}.gguf", lambda target: write_model(source, target, kind))


def _kept(files: ModelFiles, name: str, write: Callable[[Path], object]) -> Path:
    """The file or folder of this name for the model's content; written aside first, so that it is whole or absent."""
    assert files.gguf is not None
    digest = blake2b(files.gguf.read_bytes(), digest_size=8).hexdigest()
    target = environment_folder("models") / f"{files.name}-{digest}" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{os.getpid()}-{name}")
        write(aside)
        os.rename(aside, target)
    return target
