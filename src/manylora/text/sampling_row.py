"""What the sampler is told of one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

from manylora.text.params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One sequence for which a token is due. Holds the engine's own lists; nothing is copied or changed."""

    params: SamplingParams

    seed: int
    """From sample_seed(params.seed, sample); kept for the life of the sequence."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Tokens generated so far; their number is the output position of the token now due."""

    banned_token_ids: Sequence[int] = ()
    """Tokens that cannot be chosen now: the stop tokens, while fewer than min_tokens exist."""

    @property
    def changes_scores(self) -> bool:
        """Whether penalties or bans make the scores differ from the model's logits."""
        return self.params.has_penalties or bool(self.banned_token_ids)
