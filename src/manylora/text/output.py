"""What the engine gives back: by step, and gathered for a whole request."""

from collections.abc import Sequence
from dataclasses import dataclass

from manylora.lifecycle import RequestState, TerminalEvent
from manylora.lora.mixture import BASE, Mixture
from manylora.text.sampling import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought to one sample of a request."""

    request_id: str
    index: int
    """0 .. n - 1 among the samples of the request."""
    token_ids: tuple[int, ...] = ()
    """New tokens."""
    text: str = ""
    """New text. It may lag behind the tokens: half a character, or the beginning of a stop string, is held back."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token, if they were asked for."""
    event: TerminalEvent | None = None
    """How the sample ended; comes once, with its last output."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt, tokens whose KV was there already when the sample first ran."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample, from its first token to its end."""

    request_id: str
    index: int
    mixture: Mixture
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    event: TerminalEvent

    @property
    def finish_reason(self) -> str:
        """ "stop", "length", "cancelled" or "failed"."""
        return str(self.event.reason or self.event.state)

    @property
    def error(self) -> Exception | None:
        """Why the request failed; None unless it did."""
        return self.event.error if self.event.state is RequestState.FAILED else None


def join(mixture: Mixture, outputs: Sequence[Output]) -> Completion:
    """Put the outputs of one sample together, the last of which ended it."""
    last = outputs[-1]
    assert last.event is not None, "a sample that has not ended"
    return Completion(
        request_id=last.request_id,
        index=last.index,
        mixture=mixture,
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        event=last.event,
    )


def refused(error: Exception, index: int = 0) -> Completion:
    """The completion of a sample whose request was refused before it began."""
    event = TerminalEvent(RequestState.FAILED, error=error)
    return Completion("", index, mixture=BASE, token_ids=(), text="", logprobs=(), event=event)
