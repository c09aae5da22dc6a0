"""A request as the engine sees it, and its sequences: the samples drawn from one prompt.

Holds tokens, pages and states; decides nothing.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from manylora.lifecycle import Lifecycle
from manylora.lora.adapter import AdapterId
from manylora.lora.mixture import Mixture
from manylora.memory.block_table import BlockTable
from manylora.text.params import SamplingParams

AdapterKey = Hashable
"""What names an adapter before it has been read: the library's reference, fixed when the request came."""


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt with its mixture. Never changes."""

    request_id: str
    arrival: int
    """Requests are numbered as they come; a smaller number is older."""
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """params.max_tokens, or what the context leaves."""
    mixture: Mixture
    adapters: tuple[tuple[AdapterKey, float], ...] = ()
    """What the mixture's names pointed at when the request came, with the weights."""
    tenant: str = ""
    """On whose behalf. Nothing of one tenant's prompts is shared with, or shown to, another."""
    submitted_at: float = 0.0
    """Seconds on the scheduler's clock."""
    deadline: float | None = None
    """By when the first token is wanted, on the same clock."""


@dataclass(eq=False)
class Sequence:
    """One sample of a request, in the scheduler's hands."""

    request: Request
    index: int
    """0 .. n - 1 among the samples of the request."""
    tokens: list[int]
    """Prompt and output."""
    block_table: BlockTable
    num_computed: int = 0
    """Leading tokens whose KV is in the pool."""
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    mixture: tuple[tuple[AdapterId, float], ...] | None = None
    """The mixture by content, in a fixed order; None until every adapter has been read."""
    adapter_pages: dict[AdapterId, int] = field(default_factory=dict)
    """Pages that each adapter of the mixture takes; empty until every adapter has been read."""
    held: list[AdapterId] = field(default_factory=list)
    """Adapters that stay resident on behalf of this sequence."""
    num_cached: int | None = None
    """Tokens whose KV was found in the prefix cache when the sequence first ran; None: it has not run yet."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def has_run(self) -> bool:
        """Whether it was ever admitted; one that waits nevertheless was preempted."""
        return self.num_cached is not None

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def in_prefill(self) -> bool:
        return self.num_pending > 1
