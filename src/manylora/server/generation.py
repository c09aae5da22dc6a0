"""One HTTP request's samples, from submission to the last token. Knows no endpoint.

Whatever ends a request early - the client leaves, its time is over, one sample fails - ends it in the engine too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType

import msgspec
from fastapi import Request

from manylora.server.api_errors import ApiError, from_engine
from manylora.server.engine_client import EngineError, RequestStream
from manylora.server.messages import Chunk, ErrorInfo, TokenLogprobs
from manylora.server.naming import Weights
from manylora.server.protocol import Sampling
from manylora.server.service import Service, context_of

CLIENT_LEFT = 499
"""Status in the log of a request whose client went away, as nginx writes it. Nobody is there to get it."""


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int
    """Tokens of the prompts whose KV was in the prefix cache."""


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(slots=True)
class Sample:
    """What has come of one sample so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    last_token_at: float | None = None


class Generation:
    """The samples of all prompts of a request, numbered prompt by prompt. Iterate: each item is what one step brought,
    or more if the client is slow, as (number of the sample, chunk).

    Raises:
        ApiError: on entering, the prompts were refused, all of them; while iterating, a sample failed or the request
            was ended.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        body: Sampling,
        mixture: Weights,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._service, self._context, self._request = service, context_of(request), request
        self._mixture, self._prompts = mixture, prompts
        self._params = body.sampling_params()
        self._num_samples_each = body.n or 1
        self._deadline_s = _deadline_s(body, service)
        limits = [limit for limit in (body.timeout, service.config.request_timeout_s) if limit is not None]
        self._timeout_s = min(limits, default=None)
        self.samples = [Sample() for _ in range(len(prompts) * self._num_samples_each)]
        self._num_open = len(self.samples)
        self._num_cached = [0] * len(prompts)
        self._streams: list[RequestStream] = []
        # One step's worth: what a slow client leaves waits in the streams, which bound it.
        self._queue: asyncio.Queue[tuple[int, Chunk] | Exception] = asyncio.Queue(len(self.samples))
        self._accepting: asyncio.Task[list[RequestStream]] | None = None
        self._cause: ApiError | None = None
        self._stack = AsyncExitStack()

    # -- life

    async def __aenter__(self) -> Generation:
        async with self._stack as stack:
            watch = asyncio.create_task(self._watch_client())
            stack.callback(watch.cancel)
            if self._timeout_s is not None:
                error = ApiError(
                    408,
                    f"the request was not done within {self._timeout_s:g} s",
                    code="timeout",
                    headers={"X-Should-Retry": "false"},  # OpenAI's clients repeat a 408 unless told not to
                )
                left_s = self._timeout_s - (monotonic() - self._context.began)
                if left_s <= 0:  # a timer would come after the engine was asked
                    self._end(error)
                timer = asyncio.get_running_loop().call_later(left_s, self._end, error)
                stack.callback(timer.cancel)
            await self._submit(stack)
            for number, stream in enumerate(self._streams):
                stack.callback(asyncio.create_task(self._pump(number, stream)).cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _left_s(self, seconds: float | None) -> float | None:
        """What is left of a time that began when the request came; of one that is over, next to nothing."""
        if seconds is None:
            return None
        return max(seconds - (monotonic() - self._context.began), 1e-3)

    async def _submit(self, stack: AsyncExitStack) -> None:
        client, context = self._service.client, self._context
        stack.callback(self._count)
        if self._cause is not None:
            raise self._cause
        asked = client.submit_all(
            {f"{next(self._service.serial)}-{context.request_id}": prompt for prompt in self._prompts},
            self._params,
            self._mixture,
            tenant=context.tenant.name,
            deadline_s=self._left_s(self._deadline_s),
        )
        self._accepting = asyncio.create_task(asked)
        try:
            streams = await self._accepting
        except asyncio.CancelledError:
            if self._cause is None:  # it is not `_end` that cancels
                raise
            raise self._cause from None
        except EngineError as error:
            self._service.metrics.requests.labels(context.tenant.name, error.kind).inc(self._num_open)
            self._num_open = 0
            raise self._failure(error.info, began=False) from None
        for stream in streams:
            self._streams.append(await stack.enter_async_context(stream))
        if self._cause is not None:  # ended while it was submitted
            raise self._cause

    async def _pump(self, prompt: int, stream: RequestStream) -> None:
        first = prompt * self._num_samples_each
        try:
            async for chunk in stream:
                await self._queue.put((first + chunk.index, chunk))
        except Exception as error:  # a fault of ours, which must not leave the reader waiting
            await self._queue.put(error)

    async def _watch_client(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._end(ApiError(CLIENT_LEFT, "the client went away"))

    def _end(self, cause: ApiError) -> None:
        self._cause = self._cause or cause
        self._context.fields["error"] = self._cause.body.error.message
        if self._accepting is not None:
            self._accepting.cancel()
        for stream in self._streams:
            stream.cancel()

    # -- what comes

    def __aiter__(self) -> AsyncIterator[list[tuple[int, Chunk]]]:
        return self

    async def __anext__(self) -> list[tuple[int, Chunk]]:
        if not self._num_open:
            raise StopAsyncIteration
        batch = [await self._queue.get()]
        while not self._queue.empty():
            batch.append(self._queue.get_nowait())
        now, taken = monotonic(), []
        for item in batch:
            if isinstance(item, Exception):
                raise item
            self._take(*item, now)
            taken.append(item)
        return taken

    def _take(self, number: int, chunk: Chunk, now: float) -> None:
        sample, metrics, tenant = self.samples[number], self._service.metrics, self._context.tenant.name
        if chunk.token_ids:
            self._time_tokens(sample, number, chunk, now)
            sample.token_ids += chunk.token_ids
            sample.logprobs += chunk.logprobs
        sample.text.append(chunk.text)
        if not chunk.is_last:
            return
        self._num_open -= 1
        sample.finish_reason = chunk.finish_reason
        metrics.requests.labels(tenant, chunk.finish_reason or chunk.error.kind).inc()  # type: ignore[union-attr]
        metrics.request_s.observe(now - self._context.began)
        if chunk.error is not None:
            raise self._failure(chunk.error, began=True)
        if chunk.finish_reason == "cancelled":
            raise self._cause or ApiError(503, "the server is shutting down", retry_after_s=1)

    def _time_tokens(self, sample: Sample, number: int, chunk: Chunk, now: float) -> None:
        metrics, tenant = self._service.metrics, self._context.tenant.name
        if sample.last_token_at is not None:
            metrics.between_tokens_s.observe((now - sample.last_token_at) / len(chunk.token_ids))
        else:
            metrics.first_token_s.observe(now - self._context.began)
            if number % self._num_samples_each == 0:
                prompt = number // self._num_samples_each
                self._num_cached[prompt] = chunk.num_cached_tokens
                metrics.prompt_tokens.labels(tenant).inc(len(self._prompts[prompt]))
                metrics.cached_tokens.labels(tenant).inc(chunk.num_cached_tokens)
        sample.last_token_at = now

    # -- what it was

    @property
    def usage(self) -> Usage:
        num_prompt = sum(map(len, self._prompts))
        num_generated = sum(len(sample.token_ids) for sample in self.samples)
        cached = PromptTokensDetails(sum(self._num_cached))
        return Usage(num_prompt, num_generated, num_prompt + num_generated, cached)

    @property
    def _adapters(self) -> list[str]:
        return [name for name, _ in self._mixture]

    def _count(self) -> None:
        """Once, when it is over, however it ended."""
        metrics, tenant, usage = self._service.metrics, self._context.tenant.name, self.usage
        metrics.generated_tokens.labels(tenant).inc(usage.completion_tokens)
        if self._num_open:  # nobody waited for their ends
            metrics.requests.labels(tenant, "cancelled").inc(self._num_open)
        self._context.fields |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }

    def _failure(self, info: ErrorInfo, *, began: bool) -> ApiError:
        error = from_engine(info, began=began, request_id=self._context.request_id, adapters=self._adapters)
        self._context.fields["error"] = f"{info.kind}: {info.message}"
        return error


def _deadline_s(body: Sampling, service: Service) -> float | None:
    """Seconds from the request's arrival until the first token has to come.

    Raises:
        ApiError: the request names a deadline, and nothing here would heed it.
    """
    if body.deadline is not None and not service.config.heeds_deadlines:
        raise ApiError(
            400,
            f"deadlines are heeded by the policy 'slo' alone; this server runs '{service.config.policy}'",
            param="deadline",
        )
    return body.deadline if body.deadline is not None else service.config.first_token_deadline_s
