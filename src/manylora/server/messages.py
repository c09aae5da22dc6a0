"""What goes over the pipe between the API process and the engine process. Knows neither HTTP nor tensors.

    API -> engine                             engine -> API
      EngineSetup      once, the first          Ready | StartFailed   once, the first
      Submit, Cancel   requests                 Step                  all that one step brought, in one frame
      Call             questions and changes of adapters

The API process closes the pipe to end the engine process; either takes a closed pipe for the other's death.
Both ends are the same version of manylora, so structs are written as arrays, without field names.
"""

from typing import Any, Literal

import msgspec

from manylora.text.config import EngineConfig
from manylora.text.stats import EngineStats

UNAVAILABLE = "Unavailable"
"""`ErrorInfo.kind` where no class of manylora.errors fits: the engine has stopped, the server ends, time is up."""

Stats = EngineStats
"""Figures of the engine as they are sent: a dataclass, which msgspec writes with its field names."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of what is sent as a frame of its own."""


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """Base of what messages hold."""


# -- records


class ErrorInfo(_Record, frozen=True):
    """An error of the engine process, as far as a client may know it."""

    kind: str
    """Name of a class in manylora.errors; UNAVAILABLE; or of another exception, which is a fault of ours."""
    message: str
    retry_after_s: float | None = None
    """When asking again may help; None: the error does not say."""


class ModelInfo(_Record, frozen=True):
    """The base model and the pool that serves it."""

    name: str
    dtype: str
    """Of weights and KV: float32, bfloat16, .. or int8."""
    vocab_size: int
    max_position: int
    """Longest sequence in tokens, prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    pool_bytes: int
    """What the pool really has: whole pages."""
    page_bytes: int
    page_tokens: int


class TokenizerInfo(_Record, frozen=True):
    """The model's tokenizer, so that the API process needs neither its files nor what reads them (which is torch)."""

    backend: str
    """As the tokenizers library writes it: JSON."""
    special_tokens: dict[str, str]
    """By role: bos_token, eos_token, .."""
    chat_template: str | dict[str, str] | None


class TokenLogprobs(_Record, frozen=True):
    """Log-probabilities of one generated token under the model itself, before penalties and filters."""

    sampled: float
    """Of the token itself; -inf where it was impossible to the model's precision."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the most likely tokens, most likely first."""


class Chunk(_Record, frozen=True):
    """What one step brought to one sample of a request. The last one of a sample has a finish_reason or an error."""

    request_id: str
    index: int
    """0 .. n - 1 among the samples of the request."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""
    finish_reason: str | None = None
    """ "stop", "length" or "cancelled"."""
    error: ErrorInfo | None = None
    """Why the sample failed."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt, those whose KV was there already (prefix cache)."""

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Refused(_Record, frozen=True):
    """A request that the engine did not accept."""

    request_id: str
    error: ErrorInfo


class Reply(_Record, frozen=True):
    """What a Call brought: a result, or an error."""

    call_id: int
    result: Any = None
    error: ErrorInfo | None = None


# -- API process -> engine process


class EngineSetup(_Message, frozen=True):
    """What the engine process is to build."""

    model: str
    dtype: str
    device: str
    engine: EngineConfig
    policy: str
    policy_options: dict[str, int | float]
    adapters: tuple[str, ...]
    """Roots of the library."""
    cache_dir: str | None
    max_cache_bytes: int | None
    max_rank: int | None
    max_adapter_bytes: int | None
    max_loaded_adapters: int
    resolve_timeout_s: float
    fetch_timeout_s: float
    log_format: Literal["text", "json"]


class Submit(_Message, frozen=True):
    """Requests that are accepted or refused together. Each is answered in `Step.accepted` or `Step.refused`, and then
    by chunks."""

    prompts: tuple[tuple[str, tuple[int, ...]], ...]
    """The id of each request, and the tokens of its prompt."""
    params: dict[str, Any]
    """Fields of text.params.SamplingParams by name."""
    mixture: tuple[tuple[str, float], ...]
    tenant: str = ""
    deadline_s: float | None = None
    """Seconds from now within which the first token has to come."""


class Cancel(_Message, frozen=True):
    """End a request, accepted or not yet. No effect on one that has ended."""

    request_id: str


class Call(_Message, frozen=True):
    """Run a method of adapter_calls.AdapterCalls; answered in `Step.replies`."""

    call_id: int
    method: str
    args: dict[str, Any]


ToEngine = EngineSetup | Submit | Cancel | Call


# -- engine process -> API process


class Ready(_Message, frozen=True):
    """The model is loaded; requests may come."""

    model: ModelInfo
    tokenizer: TokenizerInfo
    stats: EngineStats


class StartFailed(_Message, frozen=True):
    """The engine could not be built. The process ends."""

    error: ErrorInfo


class Step(_Message, frozen=True):
    """All that one step, and the calls answered since the last one, brought."""

    accepted: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    replies: tuple[Reply, ...] = ()
    stats: EngineStats | None = None
    """At most four times a second, and when the engine falls idle."""


ToApi = Ready | StartFailed | Step
