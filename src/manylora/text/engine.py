"""The text engine: schedule, run, update. Every request names its own mixture of adapters; all share each forward pass.

    engine = Engine(load_model(path), load_tokenizer(path), Library("adapters/"))
    engine.submit("Once upon a time", SamplingParams(max_tokens=32), "pirate:0.8+json:0.5")
    while engine.has_work():
        for output in engine.step():
            ...

`submit` and `cancel` may be called from any thread; `step` from one. A request that cannot be served is refused when it
comes, or fails alone: the others go on.
"""

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from manylora.errors import ConfigError, ManyLoraError, RequestError
from manylora.lora.fit import check_fits
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.lora.reader import AdapterRef
from manylora.memory.unified import MemoryUse
from manylora.models.adapter_pages import AdapterPages
from manylora.models.llama import Llama
from manylora.models.lora_batch import LoraBatchBuilder
from manylora.models.sites import base_sites
from manylora.models.stacked_lora import decoder_stacks
from manylora.text.batch import build_batch
from manylora.text.config import EngineConfig
from manylora.text.detokenize import Detokenizer
from manylora.text.intake import Intake, Prompt
from manylora.text.live import LiveSequence
from manylora.text.loader import AdapterLoader
from manylora.text.output import Completion, Output, join, refused
from manylora.text.params import SamplingParams
from manylora.text.policy import FirstComeFirstServed, Policy
from manylora.text.pool import Pool
from manylora.text.runner import Runner
from manylora.text.sampling import TokenSampler
from manylora.text.scheduler import Scheduled, Scheduler
from manylora.text.sequence import Request

LOADER_WAIT_S = 0.02
"""How long a step waits, with nothing to compute, for an adapter that is on its way."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine began, and what holds at this moment."""

    num_steps: int
    num_waiting: int
    num_running: int
    num_preemptions: int
    adapter_loads: int
    adapter_hits: int
    adapter_evictions: int
    prefix_hit_tokens: int
    distinct_adapters_last_step: int
    pool_bytes: MemoryUse
    """Who holds the pool, in bytes."""


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
            model: on its device, in its dtype; the pool goes to the same device, KV has the same dtype.
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
        self._intake = Intake(
            model.config,
            tokenizer,
            library,
            num_pages=self._pool.num_pages,
            page_tokens=self._pool.layout.page_tokens,
            page_bytes=self._pool.layout.page_bytes,
        )
        stacks, sites = decoder_stacks(model.config), base_sites(model.config)
        self._loader = AdapterLoader(
            library,
            AdapterPages(self._pool.pages, stacks),
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
        self._lora = LoraBatchBuilder(self._pool.pages, stacks)
        self._runner = Runner(model, self._pool.pages, self._pool.layout)
        self._sampler = TokenSampler()
        self._open: dict[str, int] = {}  # request id -> samples that have not ended
        self._live: dict[tuple[str, int], LiveSequence] = {}
        self._submitted: deque[LiveSequence] = deque()
        self._cancelled: deque[str] = deque()
        self._num_steps = 0
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
    ) -> str:
        """Queue a request; reading its adapters begins at once. Returns its id.

        Args:
            mixture: what to run the prompt with: a name, {name: weight}, "a:1+b:0.5", or None for the base. The names
                mean what they point at now, whatever they are pointed at later.
        Raises:
            RequestError: an empty prompt, one longer than the context, a mixture or option that makes no sense.
            AdapterNotFoundError: a name that the library does not hold.
            CapacityError: more tokens, or larger adapters, than the whole pool can hold.
        """
        request = self._intake.request(prompt, params or SamplingParams(), mixture, request_id)
        if request.request_id in self._open:
            raise RequestError(
                f"a request with the id '{request.request_id}' is being served; ids must differ"
            )
        live = [self._begin(request, index) for index in range(request.params.n)]
        self._open[request.request_id] = request.params.n
        self._loader.demand(request)
        self._submitted.extend(live)
        return request.request_id

    def cancel(self, request_id: str) -> None:
        """End a request; its pages are free within one step. No effect on one that has ended."""
        self._cancelled.append(request_id)

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt; raises RequestError as `submit` would."""
        return self._intake.tokenize(prompt)

    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._open)

    # -- steps

    def step(self) -> list[Output]:
        """Advance every request that can: one forward pass. Returns what it brought; [] while all wait for adapters."""
        outputs = self._take_in()
        scheduled = self._scheduler.schedule()
        for sequence, error in self._scheduler.take_rejected():
            live = self._live[sequence.request.request_id, sequence.index]
            outputs.append(self._forget(live, live.end(sequence.lifecycle.fail(error))))
        if scheduled:
            outputs += self._run(scheduled)
        elif not outputs and self._live:
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
        each = (
            [params] * len(prompts)
            if params is None or isinstance(params, SamplingParams)
            else list(params)
        )
        mixed = [None] * len(prompts) if mixtures is None else list(mixtures)
        if not len(prompts) == len(each) == len(mixed):
            raise ConfigError(
                f"{len(prompts)} prompts, {len(each)} params and {len(mixed)} mixtures do not match"
            )
        slots: list[list[Completion | tuple[str, int]]] = []
        wanted: dict[tuple[str, int], Mixture] = {}
        for prompt, one, mixture in zip(prompts, each, mixed, strict=True):
            try:
                parsed = Mixture.parse(mixture)
                request_id = self.submit(prompt, one, parsed)
                keys = [(request_id, index) for index in range(one.n if one else 1)]
                slots.append([*keys])
                wanted |= dict.fromkeys(keys, parsed)
            except ManyLoraError as error:
                slots.append([refused(error)])
        done = self._finish_all(wanted)
        return [done[slot] if isinstance(slot, tuple) else slot for group in slots for slot in group]

    def stats(self) -> EngineStats:
        """Counts for people and metrics."""
        adapters, scheduler = self._pool.memory.adapters.stats, self._scheduler
        return EngineStats(
            num_steps=self._num_steps,
            num_waiting=len(scheduler.waiting) + len(self._submitted),
            num_running=len(scheduler.running),
            num_preemptions=scheduler.num_preemptions,
            adapter_loads=adapters.loads,
            adapter_hits=adapters.hits,
            adapter_evictions=adapters.evictions,
            prefix_hit_tokens=scheduler.num_prefix_tokens,
            distinct_adapters_last_step=self._distinct_adapters,
            pool_bytes=self._pool.bytes_held,
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

    def _begin(self, request: Request, index: int) -> LiveSequence:
        return LiveSequence(
            request,
            index,
            page_tokens=self._pool.layout.page_tokens,
            eos_token_ids=self.model.config.eos_token_ids,
            detokenizer=self._detokenizer,
        )

    def _take_in(self) -> list[Output]:
        """Take in what other threads brought since the last step: requests, cancellations, adapters."""
        while self._submitted:
            live = self._submitted.popleft()
            self._live[live.key] = live
            self._scheduler.add(live.sequence)
        outputs = []
        while self._cancelled:
            request_id = self._cancelled.popleft()
            for live in [live for key, live in self._live.items() if key[0] == request_id]:
                outputs.append(self._take_out(live, live.end(live.sequence.lifecycle.cancel())))
        failures = self._loader.poll()
        for live in list(self._live.values()) if failures else ():
            error = next((failures[ref] for ref in _refs(live.sequence.request) if ref in failures), None)
            if error is not None and live.sequence in self._scheduler.waiting:
                outputs.append(self._take_out(live, live.end(live.sequence.lifecycle.fail(error))))
        return outputs

    def _run(self, scheduled: SequenceOf[Scheduled]) -> list[Output]:
        batch = build_batch(scheduled, self._loader.resident, self._lora, self._pool.pages.device)
        self._num_steps += 1
        self._distinct_adapters = batch.num_adapters
        logits = self._runner.run(batch)
        live = [self._live[s.sequence.request.request_id, s.sequence.index] for s in batch.sampled]
        tokens = self._sampler.sample(logits, [one.sampling_row() for one in live])
        outputs = []
        for s in batch.scheduled:
            if not s.samples:
                self._scheduler.update(s, None)
        for s, one, token in zip(batch.sampled, live, tokens, strict=True):
            self._scheduler.update(s, token.token_id)
            output = one.extend(token)
            outputs.append(output if output.event is None else self._take_out(one, output))
        return outputs

    def _take_out(self, live: LiveSequence, last: Output) -> Output:
        """Let go of a sequence that the scheduler still has; hands its last output on."""
        self._scheduler.remove(live.sequence)
        return self._forget(live, last)

    def _forget(self, live: LiveSequence, last: Output) -> Output:
        request_id, _ = live.key
        del self._live[live.key]
        self._open[request_id] -= 1
        if self._open[request_id] == 0:
            del self._open[request_id]
            self._loader.release(live.sequence.request)
        return last

    def _finish_all(self, wanted: Mapping[tuple[str, int], Mixture]) -> dict[tuple[str, int], Completion]:
        """Step until these samples have ended."""
        parts: dict[tuple[str, int], list[Output]] = {key: [] for key in wanted}
        done: dict[tuple[str, int], Completion] = {}
        while len(done) < len(wanted):
            for output in self.step():
                key = (output.request_id, output.index)
                if key not in wanted:
                    continue
                parts[key].append(output)
                if output.event is not None:
                    done[key] = join(wanted[key], parts.pop(key))
        return done


def _refs(request: Request) -> list[AdapterRef]:
    """What the request demands of the loader: the references that `submit` put into it."""
    return [key for key, _ in request.adapters if isinstance(key, AdapterRef)]
