"""The consistency function and its boundary."""

import pytest
import torch
from diffusers import LCMScheduler
from torch.testing import assert_close

from manylora.diffusion import boundary_scalings, consistency


def test_it_is_the_identity_at_zero():
    z, x0 = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(consistency(z, x0, torch.zeros(3, dtype=torch.int64)), z)
    later = consistency(z, x0, torch.tensor([0, 19, 999]))
    assert torch.equal(later[0], z[0])
    assert_close(later[1:], x0[1:], atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("t", [0, 1, 19, 999])
def test_scalings_are_diffusers(t):
    ours = boundary_scalings(torch.tensor(t))
    theirs = LCMScheduler().get_scalings_for_boundary_condition_discrete(t)
    assert [c.item() for c in ours] == pytest.approx(list(theirs))


def test_the_boundary_is_a_switch():
    assert boundary_scalings(torch.tensor(19))[0].item() == pytest.approx(6.9e-6, rel=0.01)
