"""Settings of the server, beside those of the engine (text/config.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manylora.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What `manylora serve` offers to whom. Each field is an option of the command."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of the machine."""

    port: int = 8000
    """Port to listen on; 0 takes a free one, which the start-up line names."""

    served_model_name: str | None = None
    """The name by which requests call the base; by default the model's own."""

    api_keys: Path | None = None
    """JSON file of API keys, each with its tenant and the adapters it may see. Without it everybody may see all."""

    max_body_bytes: int = 4 << 20
    """Largest body of a request; more is answered with 413."""

    body_timeout_s: float = 30.0
    """Longest that a client may take to send a request's body."""

    client_timeout_s: float = 30.0
    """Longest that a client may leave what was sent to it unread; then its request is cancelled."""

    max_backlog: int = 1024
    """Most steps' worth of an answer that wait for a client to read them; then its request is cancelled."""

    request_timeout_s: float | None = None
    """Longest that a request may take from its acceptance to its end; then it is cancelled. None: no limit."""

    call_timeout_s: float = 60.0
    """Longest that an answer about adapters may take: listing, loading, unloading, pinning."""

    keep_alive_s: float = 5.0
    """How long a connection may be idle between requests."""

    start_timeout_s: float = 600.0
    """Longest that loading the model may take."""

    drain_timeout_s: float = 30.0
    """On SIGTERM and SIGINT, how long requests under way may go on before they are cancelled."""

    first_token_deadline_s: float | None = None
    """Deadline of the first token where a request names none; the policy `slo` refuses what cannot make it."""

    log_format: Literal["text", "json"] = "text"
    """Access log for people, or one JSON object a line."""

    def __post_init__(self) -> None:
        for name in (
            "max_body_bytes",
            "body_timeout_s",
            "client_timeout_s",
            "max_backlog",
            "call_timeout_s",
            "keep_alive_s",
            "start_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("request_timeout_s", "first_token_deadline_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 or none, got {getattr(self, name)}")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s must be 0 or more, got {self.drain_timeout_s}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
