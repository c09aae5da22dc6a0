"""The load generator: sends requests, reads their streams, notes times. It imports nothing heavy and measures itself.

    python -m manylora.bench.serve.client JOB.json REPORT.json

says "ready" on standard output, begins when a line comes on standard input, says "done", and stays until its input
ends, so that its processor time can be told from that of strangers.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec

from manylora.bench.serve.job import MISSED, Job, Outcome, Report, ServeRequest


class Usage(msgspec.Struct):
    completion_tokens: int


class Failure(msgspec.Struct):
    message: str = ""


class Event(msgspec.Struct):
    """Of a streamed completion, what the generator reads; the rest is skipped unread."""

    choices: list[msgspec.Raw] = []
    usage: Usage | None = None
    error: Failure | None = None


class Events:
    """Server-sent events from pieces of any size: what follows "data:" on each line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


class LoadGenerator:
    """Runs one job."""

    def __init__(self, job: Job, session: aiohttp.ClientSession) -> None:
        self._job = job
        self._session = session
        self._decode = msgspec.json.Decoder(Event).decode
        self._outcomes: list[Outcome] = []
        self._num_events = 0
        self._start_s = 0.0

    async def run(self) -> Report:
        self._start_s = time.perf_counter()
        cpu_s = time.process_time()
        if self._job.concurrency is None:
            await self._open_loop()
        else:
            await self._closed_loop(self._job.concurrency)
        return Report(tuple(self._outcomes), self._now(), time.process_time() - cpu_s, self._num_events)

    async def _open_loop(self) -> None:
        """Each request at its time, however many are under way."""
        asked: list[asyncio.Task[None]] = []
        async with asyncio.TaskGroup() as tasks:
            for request in self._job.requests:
                await asyncio.sleep(request.at_s - self._now())
                asked.append(tasks.create_task(self._ask(request, request.at_s)))
            if self._job.drain_s is not None:
                await asyncio.wait(asked, timeout=self._job.drain_s)
                # Tasks begin in the order of their making, and all have begun by now.
                for task, outcome in zip(asked, self._outcomes, strict=True):
                    if outcome.first_s is None:
                        task.cancel()

    async def _closed_loop(self, concurrency: int) -> None:
        """So many at a time; the end cuts off what is under way."""
        requests = itertools.cycle(self._job.requests)

        async def ask_for_ever() -> None:
            while True:
                await self._ask(next(requests), self._now())

        tasks = [asyncio.create_task(ask_for_ever()) for _ in range(concurrency)]
        await asyncio.sleep(self._job.closed_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, request: ServeRequest, planned_s: float) -> None:
        outcome = Outcome(
            tenant=request.tenant,
            adapter=request.adapter,
            prompt_tokens=len(request.prompt),
            asked_tokens=request.output_tokens,
            planned_s=planned_s,
            sent_s=self._now(),
            error=MISSED,  # until it ends
        )
        self._outcomes.append(outcome)
        try:
            async with self._session.post(
                self._job.url + "/v1/completions", data=self._body(request), headers=self._headers(request)
            ) as response:
                outcome.status = response.status
                if response.status == 200:
                    outcome.error = await self._read(response, outcome)
                else:
                    outcome.error = self._refusal(await response.read())
        except TimeoutError:
            outcome.error = f"not finished within {self._job.timeout_s:g} s"
        except (aiohttp.ClientError, msgspec.DecodeError) as error:
            outcome.error = f"{type(error).__name__}: {error}"

    async def _read(self, response: aiohttp.ClientResponse, outcome: Outcome) -> str | None:
        """Read a stream to its end; return what was wrong with it."""
        events, num_told = Events(), None
        async for piece in response.content.iter_any():
            now_s = self._now()
            for data in events.feed(piece):
                self._num_events += 1
                if data == b"[DONE]":
                    return self._check_count(outcome, num_told)
                event = self._decode(data)
                if event.error is not None:
                    return event.error.message[:300]
                if event.choices:
                    outcome.first_s = now_s if outcome.first_s is None else outcome.first_s
                    outcome.last_s = now_s
                    outcome.num_tokens += 1
                if event.usage is not None:
                    num_told = event.usage.completion_tokens
        return "the stream broke off"

    def _refusal(self, body: bytes) -> str:
        """The message of an error in OpenAI's shape, or the body as it is."""
        try:
            failure = self._decode(body).error
        except msgspec.DecodeError:
            failure = None
        return (failure.message if failure else body.decode(errors="replace"))[:300]

    @staticmethod
    def _check_count(outcome: Outcome, num_told: int | None) -> str | None:
        """A server that gives fewer tokens than asked would look faster than it is."""
        if num_told is None:
            return "the server sent no usage; it must heed stream_options.include_usage"
        # An event may bring several tokens; the server's count is of all.
        outcome.num_tokens = num_told
        if num_told != outcome.asked_tokens:
            return f"{num_told} tokens came, {outcome.asked_tokens} were asked for; the server must heed ignore_eos"
        return None

    def _body(self, request: ServeRequest) -> bytes:
        adapter = request.adapter
        return msgspec.json.encode(
            {
                "model": self._job.base if adapter is None else self._job.adapters[adapter],
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )

    def _headers(self, request: ServeRequest) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._job.keys:
            headers["Authorization"] = f"Bearer {self._job.keys[request.tenant]}"
        return headers

    def _now(self) -> float:
        return time.perf_counter() - self._start_s


async def generate_load(job: Job) -> Report:
    """Run a job in this process."""
    # A connection for each request: one that the server has just closed for idleness must not count as its failure.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=job.timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await LoadGenerator(job, session).run()


def main(job_file: str, report_file: str) -> None:
    # Overload means thousands of open connections.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    job = msgspec.json.decode(Path(job_file).read_bytes(), type=Job)
    print("ready", flush=True)
    sys.stdin.readline()
    report = asyncio.run(generate_load(job))
    Path(report_file).write_bytes(msgspec.json.encode(report))
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
