"""Settings of the server, beside those of the engine (text/config.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manylora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What `manylora serve` offers to whom. Each field is an option of the command."""

    model: str
    """Base model: a folder, a GGUF file, a hub id, or smollm2-135m-instruct."""

    adapters: tuple[str, ...] = ()
    """Folder or URL (s3://.., https://.., hf://..) that holds adapters; repeatable. Nothing else is ever read."""

    dtype: str = "float32"
    """Of base weights and KV: float32, bfloat16, float16; int8: faster on a CPU, coarser, with KV of bfloat16."""

    device: str = "cpu"
    """Where to run: cpu, cuda."""

    served_model_name: str | None = None
    """The name by which requests call the base; by default the model's own."""

    policy: str = "fcfs"
    """Who goes first. fcfs: in order of arrival; cluster: few distinct adapters at a time; fair: tenants and adapters
    get equal shares; slo: by the deadline of the first token, refusing early what cannot make it. Or one of your own:
    package.module:Class."""

    policy_options: tuple[str, ...] = ()
    """Options of the policy, as name=value with commas between: max_distinct=16,max_overtaken=64."""

    first_token_deadline_s: float | None = None
    """Deadline of the first token where a request names none; refused unless the policy is `slo` or one of your own."""

    cache_dir: Path | None = None
    """Where adapters of remote roots are copied to; by default in the user's cache folder."""

    max_cache_bytes: int | None = None
    """Beyond this, copies that were not used for longest are removed. None: never."""

    max_rank: int | None = None
    """Adapters with a larger rank at any site are refused. None: any rank."""

    max_adapter_bytes: int | None = None
    """Adapters with larger weights are refused before they are read or fetched. None: any size."""

    max_loaded_adapters: int = 10_000
    """Most names that load_lora_adapter may have given at a time. What lies below a root needs none."""

    api_keys: Path | None = None
    """JSON file of API keys, each with its tenant and the adapters it may see. Without it everybody may see all."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of the machine."""

    port: int = 8000
    """Port to listen on; 0 takes a free one, which the start-up line names."""

    max_body_bytes: int = 4 << 20
    """Largest body of a request; more is answered with 413."""

    body_timeout_s: float = 30.0
    """Longest that a client may take to send a request's head, and its body."""

    client_timeout_s: float = 30.0
    """Longest that a client may leave unread what was sent to it; then its request is cancelled."""

    max_backlog: int = 4096
    """Most pieces of an answer that wait for a client to read them; then its request is cancelled."""

    request_timeout_s: float | None = None
    """Longest that a request may take from its arrival to its end; then it fails. None: no limit."""

    resolve_timeout_s: float = 10.0
    """Longest that a remote root may take to say whether it holds an adapter; then the request fails."""

    fetch_timeout_s: float = 300.0
    """Longest that a remote root may take to send an adapter; then the requests that name it fail."""

    call_timeout_s: float = 60.0
    """Longest that an answer about adapters may take: listing, loading, unloading, pinning."""

    keep_alive_s: int = 5
    """How long a connection may be idle between requests."""

    start_timeout_s: float = 600.0
    """Longest that loading the model may take."""

    drain_timeout_s: float = 30.0
    """On SIGTERM and SIGINT, how long requests under way may go on before they are cancelled. 0: not at all."""

    drain_notice_s: float = 0.0
    """On SIGTERM and SIGINT, how long at least /ready says 503 before connections are refused, even if nothing is under
    way: as long as whoever balances load takes to notice. 0: an idle server ends at once."""

    log_format: Literal["text", "json"] = "text"
    """Logs, the access log among them, for people or as one JSON object a line."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        for name in ("drain_timeout_s", "drain_notice_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        if self.first_token_deadline_s is not None and not self.heeds_deadlines:
            raise ConfigError(
                f"first_token_deadline_s is {self.first_token_deadline_s:g}, and the policy {self.policy!r} heeds no "
                "deadlines; choose the policy 'slo', or leave the deadline out"
            )
        self.policy_values  # noqa: B018  # refuses what it cannot read

    @property
    def heeds_deadlines(self) -> bool:
        """Whether deadlines of first tokens may have an effect: of a policy of one's own, that is not known."""
        return self.policy == "slo" or ":" in self.policy

    @property
    def policy_values(self) -> dict[str, float]:
        """`policy_options` by name; whole numbers are ints.

        Raises:
            ConfigError: a part that is not name=number.
        """
        values: dict[str, float] = {}
        for part in self.policy_options:
            name, _, number = part.partition("=")
            try:
                values[name.strip()] = float(number) if {*number} & {*".en"} else int(number)
            except ValueError:
                raise ConfigError(f"policy_options are name=number, got {part!r}") from None
        return values


_POSITIVE = (
    "first_token_deadline_s",
    "max_loaded_adapters",
    "max_body_bytes",
    "body_timeout_s",
    "client_timeout_s",
    "max_backlog",
    "request_timeout_s",
    "resolve_timeout_s",
    "fetch_timeout_s",
    "call_timeout_s",
    "keep_alive_s",
    "start_timeout_s",
)
