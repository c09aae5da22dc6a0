"""The native kernels of every instruction set that this processor runs."""

from collections.abc import Iterator

import pytest

from manylora.kernels.native import _core


@pytest.fixture(params=_core.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set after the other."""
    chosen = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(chosen)
