"""Every error that manylora raises on purpose, in one tree.

    ManyLoraError
      ConfigError               a setting or an option, before anything runs
      RequestError              a request that cannot be served as it stands: empty prompt, weight that is not finite
      ModelError                a base model that cannot be loaded: unknown architecture, missing tensor
      DataError                 training data that cannot be used: no rows, malformed row
      TrainingError             a run that cannot go on: loss not finite, checkpoint unreadable
      AdapterError
        AdapterFormatError      a file or config that is not a LoRA that we read: truncated, DoRA, unknown key
        AdapterMismatchError    a sound adapter that does not fit this base model
        AdapterNotFoundError    a name that no root holds
        AdapterUnavailableError an adapter that cannot be had now: its root does not answer, the disk is full
      CapacityError             what can never fit (what cannot fit now waits)
      OverloadedError           a sound request that comes at a bad time: the queue is full, its deadline out of reach
      KernelUnavailable         no backend for this device and dtype

A message names the thing, what was expected, what came and what to do. `assert` is for our own bugs only.
"""


class ManyLoraError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(ManyLoraError):
    """A setting that is unknown, out of range, or that contradicts another."""


class RequestError(ManyLoraError):
    """A request that cannot be served as it stands."""


class ModelError(ManyLoraError):
    """A base model that cannot be loaded."""


class DataError(ManyLoraError):
    """Training data that cannot be used."""


class TrainingError(ManyLoraError):
    """A training run that cannot go on."""


class AdapterError(ManyLoraError):
    """Base of what can be wrong with an adapter."""


class AdapterFormatError(AdapterError):
    """A file or config that is not a LoRA that manylora reads."""


class AdapterMismatchError(AdapterError):
    """A sound adapter that does not fit the base model."""


class AdapterNotFoundError(AdapterError):
    """A name that no root holds."""


class AdapterUnavailableError(AdapterError):
    """An adapter that cannot be had now. Asking again later may help."""


class CapacityError(ManyLoraError):
    """What can never fit in the memory given."""


class OverloadedError(ManyLoraError):
    """A sound request that cannot be served in time now. The same request may be served later."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        """retry_after_s: when it makes sense to ask again, an estimate."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KernelUnavailable(ManyLoraError):
    """No kernel backend serves this device and dtype."""
