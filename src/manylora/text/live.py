"""A sequence that has not ended, with what turns its sampled tokens into text and says when it ends."""

from collections.abc import Collection
from typing import Any

from manylora.errors import AdapterError, ManyLoraError, ModelError, RequestError
from manylora.lifecycle import FinishReason, RequestState, TerminalEvent
from manylora.memory.block_table import BlockTable
from manylora.text.detokenize import Detokenizer
from manylora.text.guide import Guide
from manylora.text.output import Output
from manylora.text.sampling import SampledToken, SamplingRow, sample_seed
from manylora.text.sequence import Request, Sequence
from manylora.text.stop import StopChecker


class LiveSequence:
    """What the engine keeps of one sample of a request, beside what the scheduler does."""

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        page_tokens: int,
        eos_token_ids: Collection[int],
        detokenizer: Detokenizer | None,
        guide: Guide | None,
    ) -> None:
        params = request.params
        self._guide = guide
        self.sequence = Sequence(request, index, list(request.prompt), BlockTable(page_tokens))
        self._seed = sample_seed(params.seed, index)
        self._stop = StopChecker(
            params,
            eos_token_ids=eos_token_ids,
            max_tokens=request.max_tokens,
            detokenizer=None
            if detokenizer is None
            else detokenizer.start(skip_special_tokens=params.skip_special_tokens, context=request.prompt),
        )

    @property
    def key(self) -> tuple[str, int]:
        """Request id and index, by which outputs name a sample."""
        return self.sequence.request.request_id, self.sequence.index

    def sampling_row(self) -> SamplingRow:
        """What the sampler needs to choose the next token."""
        request, banned = self.sequence.request, self._stop.banned_token_ids
        params = request.params
        # A greedy row without penalties needs no history, and copying one costs more than its argmax.
        needs_history = banned or params.has_penalties or not params.is_greedy
        output = self.sequence.output if needs_history else ()
        return SamplingRow(params, self._seed, request.prompt, output, banned, self._guide)

    def extend(self, token: SampledToken) -> Output:
        """Take the token sampled for the sequence; the output has an event if it was the last."""
        lifecycle = self.sequence.lifecycle
        if token.is_sound and self._guide is not None and self._guide.error:
            # It failed when asked what may come, and left only the end to choose.
            return self._out_of_form(self._guide)
        if token.token_id is None:
            error = _nothing_left if token.is_sound else _not_finite
            return self.end(lifecycle.fail(error(self.sequence.request)))
        update = self._stop.push(token.token_id)
        text, reason = update.text, update.finish_reason
        if self._guide is not None and reason is not FinishReason.STOP:
            self._guide.push(token.token_id)
            if self._guide.error:
                return self._out_of_form(self._guide)
            if self._guide.is_complete:
                # With the last token that max_tokens allows, all text has been given already.
                text, reason = text if reason else text + self._stop.flush(), FinishReason.STOP
        return self._output(
            token_ids=(token.token_id,),
            text=text,
            logprobs=() if token.logprobs is None else (token.logprobs,),
            event=None if reason is None else lifecycle.finish(reason),
        )

    def end(self, event: TerminalEvent) -> Output:
        """The last output of a sequence that does not end by itself, with the text that was held back."""
        assert event.state is not RequestState.FINISHED
        return self._output(text=self._stop.flush(), event=event)

    def _out_of_form(self, guide: Guide) -> Output:
        error = RequestError(f"response_format cannot be followed: {guide.error}")
        return self.end(self.sequence.lifecycle.fail(error))

    def _output(self, **brought: Any) -> Output:
        return Output(
            *self.key,
            **brought,
            num_prompt_tokens=self.sequence.num_prompt,
            num_cached_tokens=self.sequence.num_cached or 0,
        )


def _nothing_left(request: Request) -> ManyLoraError:
    return RequestError(
        f"request '{request.request_id}': no token is left to choose; min_tokens forbids the only ones that "
        "response_format or the other parameters allow"
    )


def _not_finite(request: Request) -> ManyLoraError:
    if request.mixture:
        return AdapterError(
            f"the mixture {request.mixture} drove the model's logits to NaN or infinity; "
            "lower its weights, or look at it with `manylora inspect`"
        )
    return ModelError(f"the base model's logits for request '{request.request_id}' are not finite")
