"""The text engine: schedule, run, update. Every request names its own mixture of adapters; all share each forward pass.

    engine = Engine(load_model(path), load_tokenizer(path), Library("adapters/"))
    engine.submit("Once upon a time", SamplingParams(max_tokens=32), "pirate:0.8+json:0.5")
    while engine.has_work():
        for output in engine.step():
            ...

`submit` and `cancel` may be called from any thread; `step` from one. A request that cannot be served is refused when it
comes, or fails alone: the others go on.
"""

import time
from collections import deque
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from torch.profiler import record_function

from manylora.errors import CapacityError, OverloadedError, RequestError
from manylora.kernels import KvLayout
from manylora.lora.adapter import AdapterId
from manylora.lora.fit import check_fits
from manylora.lora.library import Library
from manylora.lora.mixture import MixtureLike
from manylora.lora.reader import AdapterRef
from manylora.models.adapter_pages import AdapterPages
from manylora.models.llama import Llama
from manylora.models.lora_batch import LoraBatchBuilder
from manylora.models.sites import base_sites
from manylora.models.stacked_lora import decoder_stacks
from manylora.text.batch import Batch, build_batch
from manylora.text.config import EngineConfig
from manylora.text.detokenize import Detokenizer
from manylora.text.guide import Guide, Guides
from manylora.text.intake import Intake, Prompt
from manylora.text.live import LiveSequence
from manylora.text.loader import AdapterLoader
from manylora.text.offline import completions
from manylora.text.output import Completion, Output
from manylora.text.pace import retry_after_s
from manylora.text.params import SamplingParams
from manylora.text.policy import FirstComeFirstServed, Policy
from manylora.text.pool import Pool
from manylora.text.residency import Residency, ResidentInfo
from manylora.text.runner import Runner
from manylora.text.sampling import SampledToken, TokenSampler
from manylora.text.scheduler import Scheduled, Scheduler
from manylora.text.sequence import Request, Sequence
from manylora.text.stats import EngineStats

LOADER_WAIT_S = 0.02
"""How long a step waits, with nothing to compute, for an adapter that is on its way."""


class Engine:
    """Serves one base model with any number of adapters from one pool of memory."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        library: Library,
        config: EngineConfig | None = None,
        policy: Policy | None = None,
    ) -> None:
        """
        Args:
            model: on its device, in its dtype; the pool goes to the same device.
            tokenizer: a transformers fast tokenizer; None serves token ids alone.
            library: where the names in mixtures are looked up.
            policy: the order of admission; first come, first served if None.
        Raises:
            ConfigError: the pool is too small for one page.
        """
        self.model = model
        self.config = config or EngineConfig()
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._pool = Pool(model, self.config)
        row_dtype = torch.int8 if self.config.adapter_dtype == "int8" else None
        self._intake = Intake(
            model.config,
            tokenizer,
            library,
            num_pages=self._pool.num_pages,
            page_tokens=self._pool.layout.page_tokens,
            page_bytes=self._pool.layout.page_bytes,
            int8_adapters=row_dtype is not None,
        )
        stacks, sites = decoder_stacks(model.config), base_sites(model.config)
        self._loader = AdapterLoader(
            library,
            AdapterPages(self._pool.pages, stacks, row_dtype),
            self._pool.memory.adapters,
            lambda adapter: check_fits(adapter, sites, model.config.name),
            max_pending=self.config.max_pending_loads,
            num_threads=self.config.load_threads,
        )
        self._scheduler = Scheduler(
            self._pool.memory,
            self._loader,
            policy or FirstComeFirstServed(),
            max_batch_tokens=self.config.max_batch_tokens,
            max_num_seqs=self.config.max_num_seqs,
        )
        self._guides = Guides(
            tokenizer, vocab_size=model.config.vocab_size, eos_token_ids=model.config.eos_token_ids
        )
        self._residency = Residency(
            library, self._loader, self._scheduler, self._pool.memory, self._pool.layout.page_bytes
        )
        self._lora = LoraBatchBuilder(self._pool.pages, stacks)
        self._runner = Runner(model, self._pool.pages, self._pool.layout)
        self._sampler = TokenSampler()
        self._open: dict[str, int] = {}  # request id -> samples that have not ended
        self._live: dict[tuple[str, int], LiveSequence] = {}
        self._submitting = Lock()  # held for look-ups only
        self._submitted: deque[LiveSequence] = deque()
        self._cancelled: deque[str] = deque()
        self._num_steps = self._num_prefill_tokens = self._num_output_tokens = self._num_ended = 0
        self._step_seconds = 0.0
        self._distinct_adapters = 0
        if self.config.debug:
            self._pool.poison_free_pages()

    # -- requests

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        mixture: MixtureLike = None,
        *,
        request_id: str | None = None,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> str:
        """Queue a request; reading its adapters begins at once. Returns its id.

        Args:
            mixture: what to run the prompt with: a name, {name: weight}, "a:1+b:0.5", or None for the base. The names
                mean what they point at now, whatever they are pointed at later.
            tenant: on whose behalf; prefixes are shared within a tenant only.
            deadline_s: seconds from now by which the first token is wanted. The policy "slo" minds it, others do not.
        Raises:
            RequestError: an empty prompt, one longer than the context, a mixture or option that makes no sense.
            AdapterNotFoundError: a name that the library does not hold.
            CapacityError: more tokens, or larger adapters, than the whole pool can hold; more samples than may wait.
            OverloadedError: as many sequences wait as `EngineConfig.max_waiting` allows.
        """
        (request_id,) = self.submit_all(
            [prompt], params, mixture, request_ids=[request_id], tenant=tenant, deadline_s=deadline_s
        )
        return request_id

    def submit_all(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams | None = None,
        mixture: MixtureLike = None,
        *,
        request_ids: SequenceOf[str | None] | None = None,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> list[str]:
        """Queue a request for each prompt, or none of them; returns their ids. All else is as in `submit`."""
        params = params or SamplingParams()
        requests = self._intake.requests(
            prompts,
            params,
            mixture,
            request_ids or [None] * len(prompts),
            tenant=tenant,
            deadline_s=deadline_s,
        )
        self._check_queue(params.n * len(requests))  # before anything is made for the samples
        form = params.response_format
        guide = None if form is None else self._guides.start(form)
        live = [self._begin(request, index, guide) for request in requests for index in range(params.n)]
        ids = [request.request_id for request in requests]
        with self._submitting:
            self._check_queue(len(live))
            for request_id in ids:
                if request_id in self._open or ids.count(request_id) > 1:
                    raise RequestError(
                        f"a request with the id '{request_id}' is being served; ids must differ"
                    )
            for request in requests:
                self._open[request.request_id] = params.n
                for ref in _refs(request):
                    self._residency.note(ref)
                self._loader.demand(request)
            self._submitted.extend(live)
        return ids

    def cancel(self, request_id: str) -> None:
        """End a request; its pages are free within one step. No effect on one that has ended."""
        self._cancelled.append(request_id)

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt; raises RequestError as `submit` would."""
        return self._intake.tokenize(prompt)

    @property
    def layout(self) -> KvLayout:
        """How the pages of the pool hold KV."""
        return self._pool.layout

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self._pool.num_pages

    def warm_up(self) -> None:
        """Take all of the pool's memory from the system now, so that no step waits for it. Before the first request."""
        assert not self._open, "the pool is in use"
        self._pool.touch()

    def has_work(self) -> bool:
        """Whether any request has not ended, or what was ordered of adapters has not been done."""
        return bool(self._open) or self._residency.has_work

    # -- adapters; any thread may call these, and the next steps carry them out

    def pin(self, name: str) -> "Future[None]":
        """Keep what a name points at now in the pool until `unpin`, loading it if it is not there.

        Returns:
            A future, done when the adapter is there; it has the error of one that cannot be read or never fits, or an
            AdapterError if the pin is taken back before.
        Raises:
            AdapterNotFoundError: a name that the library does not hold.
        """
        return self._residency.pin(name)

    def unpin(self, name: str) -> None:
        """Take back `pin(name)`, whatever the name points at by now. No effect on a name that is not pinned."""
        self._residency.unpin(name)

    def unload(self, name: str) -> "Future[int]":
        """Take a name out of the library and give its bytes back: later requests do not find it; those under way
        keep its weights, and when the last of them has ended, its pages are free.

        Returns:
            A future, done when all that is over: the bytes given back, 0 where nothing was in the pool or another name
            that was asked for points at the same content.
        Raises:
            AdapterNotFoundError: a name that the library does not hold.
        """
        return self._residency.unload(name)

    def evict(self, identity: AdapterId) -> "Future[int]":
        """Give the bytes of an adapter back as `unload` does, for whoever has taken its names away already."""
        return self._residency.evict(identity)

    def residency(self) -> list[ResidentInfo]:
        """Every adapter that has pages in the pool, the one that came first at the front."""
        return self._residency.residents()

    # -- steps

    def step(self) -> list[Output]:
        """Advance every request that can: one forward pass. Returns what it brought; [] while all wait for adapters."""
        with record_function("take in"):
            outputs = self._take_in()
        began = time.monotonic()
        with record_function("schedule"):
            scheduled = self._scheduler.schedule()
        for sequence, error in self._scheduler.take_rejected():
            live = self._live[sequence.request.request_id, sequence.index]
            outputs.append(self._forget(live, live.end(sequence.lifecycle.fail(error))))
        if scheduled:
            outputs += self._run(scheduled, began)
        self._residency.settle()
        if not outputs and not scheduled and self.has_work():
            self._loader.wait(LOADER_WAIT_S)
        if self.config.debug:
            self._scheduler.check_integrity()
            self._pool.poison_free_pages()
        return outputs

    def generate(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        mixtures: SequenceOf[MixtureLike] | None = None,
    ) -> list[Completion]:
        """Run prompts to their ends in as few passes as memory allows.

        Args:
            params: one for all, or one per prompt.
            mixtures: one per prompt; None: all run the base.
        Returns:
            The completions in the order of the prompts, n for each. A request that failed, at once or later, has
            its `error` set; the others are unharmed.
        """
        return list(self.completions(prompts, params, mixtures))

    def completions(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        mixtures: SequenceOf[MixtureLike] | None = None,
    ) -> Generator[Completion]:
        """As `generate`, but yield each completion as soon as it, and all before it, have ended.

        Who does not read to the end cancels the rest.
        """
        return completions(self, prompts, params, mixtures)

    def stats(self) -> EngineStats:
        """Counts for people and metrics."""
        adapters, scheduler = self._pool.memory.adapters.stats, self._scheduler
        return EngineStats(
            num_steps=self._num_steps,
            step_seconds=self._step_seconds,
            num_prefill_tokens=self._num_prefill_tokens,
            num_output_tokens=self._num_output_tokens,
            num_ended=self._num_ended,
            num_waiting=self._num_waiting,
            num_running=len(scheduler.running),
            num_preemptions=scheduler.num_preemptions,
            adapter_loads=adapters.loads,
            adapter_hits=adapters.hits,
            adapter_evictions=adapters.evictions,
            num_resident_adapters=self._pool.memory.adapters.num_resident,
            prefix_hit_tokens=scheduler.num_prefix_tokens,
            distinct_adapters_last_step=self._distinct_adapters,
            pool_bytes=self._pool.bytes_held,
            waiting_adapters=_names(scheduler.waiting),
            running_adapters=_names(scheduler.running),
        )

    def close(self) -> None:
        """Stop the threads that load adapters."""
        self._loader.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside

    @property
    def _num_waiting(self) -> int:
        return len(self._scheduler.waiting) + len(self._submitted)

    def _check_queue(self, num_new: int) -> None:
        """Raise OverloadedError if so many more would be too many, CapacityError if they always were."""
        num_waiting, most = self._num_waiting, self.config.max_waiting
        if most is not None and num_new > most:
            raise CapacityError(f"{num_new} samples are more than the {most} that may wait (max_waiting)")
        if most is not None and num_waiting + num_new > most:
            # What those who wait will take, at the pace so far.
            seconds_each = self._step_seconds / max(1, self._num_ended)
            raise OverloadedError(
                f"{num_waiting} sequences wait already and {num_new} more would exceed the {most} of max_waiting; "
                "ask again later",
                retry_after_s=retry_after_s(num_waiting * seconds_each),
            )

    def _begin(self, request: Request, index: int, guide: Guide | None) -> LiveSequence:
        return LiveSequence(
            request,
            index,
            page_tokens=self._pool.layout.page_tokens,
            eos_token_ids=self.model.config.eos_token_ids,
            detokenizer=self._detokenizer,
            guide=None if guide is None else guide.copy(),
        )

    def _take_in(self) -> list[Output]:
        """Take in what other threads brought since the last step: requests, cancellations, adapters."""
        # First: whoever is cancelled by now has been submitted before.
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        while self._submitted:
            live = self._submitted.popleft()
            self._live[live.key] = live
            self._scheduler.add(live.sequence)
        outputs = []
        for request_id in cancelled:
            for live in [live for key, live in self._live.items() if key[0] == request_id]:
                outputs.append(self._take_out(live, live.end(live.sequence.lifecycle.cancel())))
        failures = self._loader.poll()
        for live in list(self._live.values()) if failures else ():
            error = next((failures[ref] for ref in _refs(live.sequence.request) if ref in failures), None)
            if error is not None and live.sequence in self._scheduler.waiting:
                outputs.append(self._take_out(live, live.end(live.sequence.lifecycle.fail(error))))
        self._residency.take_in(failures)
        return outputs

    def _run(self, scheduled: SequenceOf[Scheduled], began: float) -> list[Output]:
        with record_function("batch"):
            batch = build_batch(scheduled, self._loader.resident, self._lora, self._pool.pages.device)
        with record_function("forward"):
            logits = self._runner.run(batch)
        live = [self._live[s.sequence.request.request_id, s.sequence.index] for s in batch.sampled]
        with record_function("sample"):
            tokens = self._sampler.sample(logits, [one.sampling_row() for one in live])
        self._record(batch, time.monotonic() - began)
        with record_function("extend"):
            return self._extend(batch, live, tokens)

    def _extend(
        self, batch: Batch, live: SequenceOf[LiveSequence], tokens: SequenceOf[SampledToken]
    ) -> list[Output]:
        """Hand every sequence its token, and say what that brought."""
        outputs = []
        for s in batch.scheduled:
            if not s.samples:
                self._scheduler.update(s, None)
        for s, one, token in zip(batch.sampled, live, tokens, strict=True):
            self._scheduler.update(s, token.token_id)
            output = one.extend(token)
            outputs.append(output if output.event is None else self._take_out(one, output))
        return outputs

    def _record(self, batch: Batch, seconds: float) -> None:
        """Count a step that was computed, before its tokens are handed out."""
        self._num_steps += 1
        self._step_seconds += seconds
        self._distinct_adapters = batch.num_adapters
        self._num_output_tokens += len(batch.sampled)
        # The input of a decode is the token sampled before; all others fill KV.
        self._num_prefill_tokens += sum(s.num_new for s in batch.scheduled if s.sequence.in_prefill)
        self._scheduler.stepped(batch.scheduled, seconds)

    def _take_out(self, live: LiveSequence, last: Output) -> Output:
        """Let go of a sequence that the scheduler still has; hands its last output on."""
        self._scheduler.remove(live.sequence)
        return self._forget(live, last)

    def _forget(self, live: LiveSequence, last: Output) -> Output:
        request_id, _ = live.key
        del self._live[live.key]
        self._num_ended += 1
        self._open[request_id] -= 1
        if self._open[request_id] == 0:
            del self._open[request_id]
            self._loader.release(live.sequence.request)
        return last


def _refs(request: Request) -> list[AdapterRef]:
    """What the request demands of the loader: the references that `submit` put into it."""
    return [key for key, _ in request.adapters if isinstance(key, AdapterRef)]


def _names(sequences: SequenceOf[Sequence]) -> tuple[str, ...]:
    """The adapters that sequences ask for, by name."""
    return tuple(sorted({name for sequence in sequences for name in sequence.request.mixture.names}))
