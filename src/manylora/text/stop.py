"""When a sequence ends, and what text it shows until then."""

from collections.abc import Collection
from dataclasses import dataclass

from manylora.errors import RequestError
from manylora.lifecycle import FinishReason
from manylora.text.detokenize import IncrementalDetokenizer
from manylora.text.params import SamplingParams
from manylora.text.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class StopUpdate:
    """What one token brought."""

    text: str
    """New text to show; often empty. With the last token: all that was held back."""

    finish_reason: FinishReason | None = None
    """None: the sequence goes on."""

    matched: str | int | None = None
    """The stop string, or the stop or end-of-text token, that ended the sequence; None: none did."""


class StopChecker:
    """Takes the tokens of one sequence, one at a time; gives its text and says when it ends.

    In this order: a stop or end-of-text token ends it, then a stop string, then max_tokens. The text of the token that
    ended it is not shown, nor is the stop string, unless include_stop_str_in_output asks for them.

    Raises:
        RequestError: stop strings, but no tokenizer that could make text.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        eos_token_ids: Collection[int] = (),
        max_tokens: int | None = None,
        detokenizer: IncrementalDetokenizer | None = None,
    ) -> None:
        """Begin a sequence.

        Args:
            max_tokens: the limit in force, where the context leaves less than params.max_tokens or that is None.
            detokenizer: None: there is no tokenizer, and the text is empty.
        """
        if params.stop and detokenizer is None:
            raise RequestError(
                f"stop strings {list(params.stop)} need a tokenizer, and this engine has none; use stop_token_ids"
            )
        self._stop_ids = tuple(
            sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
        )
        self._min_tokens = params.min_tokens
        self._max_tokens = params.max_tokens if max_tokens is None else max_tokens
        self._shows_stop_token = params.include_stop_str_in_output
        self._detokenizer = detokenizer
        self._strings = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._num_tokens = 0

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Tokens that the next one cannot be: those that would end the sequence before min_tokens."""
        return self._stop_ids if self._num_tokens < self._min_tokens else ()

    def push(self, token_id: int) -> StopUpdate:
        """Take the next token. Not to be called after it gave a finish_reason."""
        ends = token_id in self._stop_ids and not self.banned_token_ids
        self._num_tokens += 1
        at_limit = self._num_tokens == self._max_tokens
        text = "" if ends and not self._shows_stop_token else self._show(self._detokenize(token_id))
        if ends or at_limit:
            text += self.flush()
        if ends or self._strings.matched is not None:
            return StopUpdate(text, FinishReason.STOP, self._strings.matched or token_id)
        return StopUpdate(text, FinishReason.LENGTH if at_limit else None)

    def flush(self) -> str:
        """Return the text that is held back, for a sequence that ends here for a reason of its own."""
        if self._detokenizer is None or self._strings.matched is not None:
            return ""
        text = self._show(self._detokenizer.finish())
        return text if self._strings.matched is not None else text + self._strings.finish()

    def _detokenize(self, token_id: int) -> str:
        return "" if self._detokenizer is None else self._detokenizer.feed(token_id)

    def _show(self, piece: str) -> str:
        return self._strings.feed(piece, may_stop=self._num_tokens >= self._min_tokens)
