"""What the sampler is told of one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

from manylora.text.guide import Guide
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

    guide: Guide | None = None
    """Which tokens can be chosen at all; None: any."""

    @property
    def changes_scores(self) -> bool:
        """Whether anything makes the scores differ from the model's logits."""
        params = self.params
        return params.has_penalties or bool(params.logit_bias or self.banned_token_ids or self.guide)
