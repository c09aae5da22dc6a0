"""Equal shares: whoever has been served least goes first, by tenant, and within a tenant by mixture.

Source:
    The virtual token counter: Sheng et al. 2024, "Fairness in Serving Large Language Models".
"""

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from heapq import heapify, heappop, heappush
from math import exp
from typing import Generic, TypeVar

from manylora.errors import ConfigError
from manylora.lifecycle import RequestState
from manylora.text.policy import Computed, EngineView, Policy
from manylora.text.sequence import AdapterKey, Sequence

LATELY_S = 60.0
"""Whose last request is older than the newest of all by more is a tenant no longer."""

Mixture = tuple[AdapterKey, ...]
Party = TypeVar("Party", bound=Hashable)


class VirtualCounters:
    """How much each of several parties has been served.

    Who did not wait for a while is not owed what others got meanwhile: coming back, it begins at the counter of the
    least served party that waited. So whoever waits not and is below that need not be remembered.
    """

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}
        self._waiting: set[Hashable] = set()
        self._least = 0.0  # counter of the least served party that waited; never falls

    def __getitem__(self, party: Hashable) -> float:
        return self._served.get(party, self._least)

    def __contains__(self, party: object) -> bool:
        return party in self._served

    def wait(self, parties: set[Hashable]) -> None:
        """Say who waits now."""
        # Where nobody stayed, those who left last say how far service has come.
        before = self._waiting & parties or self._waiting
        if before:
            self._least = max(self._least, min(self[party] for party in before))
        self._served = {
            party: max(served, self._least)
            for party, served in self._served.items()
            if party in parties or served > self._least
        } | {party: self._least for party in parties if party not in self._served}
        self._waiting = parties

    def charge(self, party: Hashable, amount: float) -> None:
        """Count a service."""
        self._served[party] = self[party] + amount


class FairShare(Policy):
    """Admit for the tenant, and of its mixtures for the one, that has been served least.

    Served are prompt tokens, `input_price` each when a sequence begins to run (those found in the prefix cache are
    free), and output tokens, `output_price` each when they are sampled.

    Turns alone would let a tenant that asks for much fill every place before the others come, who then wait until an
    answer ends. So while there are others, a tenant that has its share of the places (`max_num_seqs` by tenants) and
    has had its share of what was served lately takes none of the last `reserved` ones. Who asks for little on the whole
    may have all places when it asks for much at once.
    """

    def __init__(self, input_price: float = 1.0, output_price: float = 2.0, reserved: float = 0.2) -> None:
        """
        Args:
            reserved: share of `max_num_seqs`, from 0 to below 1.
        """
        for name, price in {"input_price": input_price, "output_price": output_price}.items():
            if not price >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {price}")
        if input_price == output_price == 0:
            raise ConfigError("input_price and output_price are both 0: nothing would count as service")
        if not 0 <= reserved < 1:
            raise ConfigError(f"reserved must be from 0 to below 1, got {reserved}")
        self.input_price = input_price
        self.output_price = output_price
        self.reserved = reserved
        self._last_came: dict[str, float] = {}  # by tenant, when its newest request was submitted
        self._served_lately: Counter[str] = Counter()  # by tenant; what was served earlier counts less
        self._tenants = VirtualCounters()
        self._mixtures: dict[str, VirtualCounters] = {}  # by tenant

    def order(self, waiting: SequenceOf[Sequence], running: SequenceOf[Sequence]) -> Iterator[Sequence]:
        queues: dict[str, dict[Mixture, deque[Sequence]]] = {}
        for sequence in waiting:
            mixtures = queues.setdefault(sequence.request.tenant, {})
            mixtures.setdefault(_mixture(sequence), deque()).append(sequence)
        self._wait(queues)
        num_running = Counter(sequence.request.tenant for sequence in running)
        num_tenants = self._num_tenants(waiting)
        num_open = self._view.max_num_seqs - int(self._view.max_num_seqs * self.reserved)
        tenants = _Turns(queues, self._tenants)
        mixtures_of = {tenant: _Turns(queues[tenant], self._mixtures[tenant]) for tenant in queues}
        while tenants:
            tenant = tenants.take()
            has_share = (
                num_running[tenant] * num_tenants >= self._view.max_num_seqs
                and self._served_lately[tenant] * num_tenants >= self._served_lately.total()
            )
            if num_tenants > 1 and has_share and num_running.total() >= num_open:
                continue
            mixture = mixtures_of[tenant].take()
            queue = queues[tenant][mixture]
            sequence = queue.popleft()
            is_new = sequence.num_cached is None
            yield sequence
            # Who waits for adapters is charged when they are there; whoever is next in line has the turn meanwhile.
            if sequence.lifecycle.state is RequestState.RUNNING:
                num_running[tenant] += 1
                if is_new:
                    self._charge(sequence, self.input_price * (sequence.num_prompt - sequence.num_computed))
            if queue:
                mixtures_of[tenant].put_back(mixture)
            if mixtures_of[tenant]:
                tenants.put_back(tenant)

    def begin(self, view: EngineView) -> None:
        self._view = view

    def stepped(self, computed: SequenceOf[Computed], seconds: float) -> None:
        fading = exp(-seconds / LATELY_S)
        self._served_lately = Counter(
            {tenant: fading * served for tenant, served in self._served_lately.items() if served > 1}
        )
        for one in computed:
            if one.samples:
                self._charge(one.sequence, self.output_price)

    def _wait(self, queues: dict[str, dict[Mixture, deque[Sequence]]]) -> None:
        self._tenants.wait(set(queues))
        self._mixtures = {tenant: c for tenant, c in self._mixtures.items() if tenant in self._tenants}
        for tenant, mixtures in queues.items():
            self._mixtures.setdefault(tenant, VirtualCounters()).wait(set(mixtures))

    def _num_tenants(self, waiting: Iterable[Sequence]) -> int:
        """How many tenants there are: those that have come lately."""
        for sequence in waiting:
            came = self._last_came.get(sequence.request.tenant, 0.0)
            self._last_came[sequence.request.tenant] = max(came, sequence.request.submitted_at)
        newest = max(self._last_came.values(), default=0.0)
        self._last_came = {t: came for t, came in self._last_came.items() if newest - came <= LATELY_S}
        return len(self._last_came)

    def _charge(self, sequence: Sequence, amount: float) -> None:
        tenant = sequence.request.tenant
        self._tenants.charge(tenant, amount)
        self._served_lately[tenant] += amount  # type: ignore[assignment]  # a Counter adds up floats as well
        self._mixtures.setdefault(tenant, VirtualCounters()).charge(_mixture(sequence), amount)


class _Turns(Generic[Party]):
    """Whose turn it is: who has been served least, and among equals who comes first."""

    def __init__(self, parties: Iterable[Party], counters: VirtualCounters) -> None:
        self._counters = counters
        self._place = {party: place for place, party in enumerate(parties)}
        self._heap = [(counters[party], place, party) for party, place in self._place.items()]
        heapify(self._heap)

    def __bool__(self) -> bool:
        return bool(self._heap)

    def take(self) -> Party:
        """Take out whose turn it is."""
        return heappop(self._heap)[2]

    def put_back(self, party: Party) -> None:
        """Line a party up again, by what it has been served now."""
        heappush(self._heap, (self._counters[party], self._place[party], party))


def _mixture(sequence: Sequence) -> Mixture:
    return tuple(key for key, _ in sequence.request.adapters)
