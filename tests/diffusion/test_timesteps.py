"""Timestep tables, bit-equal to diffusers'."""

import pytest
from diffusers import DDIMScheduler, LCMScheduler

from manylora.diffusion import landing_grid, lcm_timesteps, solver_grid, started_by, trailing_timesteps
from manylora.errors import ConfigError


def test_the_published_tables():
    assert lcm_timesteps(1) == [999]
    assert lcm_timesteps(4) == [999, 759, 499, 259]
    assert lcm_timesteps(8) == [999, 879, 759, 639, 499, 379, 259, 139]


@pytest.mark.parametrize("original_steps", [50, 25, 30, 100])
def test_lcm_timesteps_are_diffusers(original_steps):
    scheduler = LCMScheduler(original_inference_steps=original_steps)
    for num_steps in range(1, original_steps + 1):
        scheduler.set_timesteps(num_steps)
        assert lcm_timesteps(num_steps, original_steps=original_steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("strength", [0.2, 0.6, 0.73])
def test_lcm_timesteps_of_a_picture_are_diffusers(strength):
    scheduler = LCMScheduler()
    for num_steps in range(1, 9):
        scheduler.set_timesteps(num_steps, strength=strength)
        assert lcm_timesteps(num_steps, strength=strength) == scheduler.timesteps.tolist()


def test_trailing_timesteps_are_diffusers():
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for num_steps in [*range(1, 101), 250, 333, 999, 1000]:
        scheduler.set_timesteps(num_steps)
        # Where the spacing is not exact in binary, theirs may add an unwanted step behind the last; ours never does.
        assert trailing_timesteps(num_steps) == scheduler.timesteps.tolist()[:num_steps]


def test_the_solver_grid_is_trailing_and_its_steps_land_on_it():
    assert solver_grid()[:3] == [19, 39, 59]
    assert solver_grid() == trailing_timesteps(50)[::-1]
    assert landing_grid() == [0, *solver_grid()[:-1]]
    assert landing_grid(30)[0] == 0


def test_a_picture_starts_in_the_middle():
    assert started_by([999, 749, 499, 249], 0.5) == [499, 249]
    assert started_by([999, 749, 499, 249], 0.1) == [249]
    with pytest.raises(ConfigError, match="strength"):
        started_by([999], 0.0)


@pytest.mark.parametrize("num_steps", [0, 51])
def test_more_steps_than_the_grid_are_refused(num_steps):
    with pytest.raises(ConfigError, match="1, 50"):
        lcm_timesteps(num_steps)


@pytest.mark.parametrize("table", [solver_grid, trailing_timesteps])
def test_no_steps_are_refused(table):
    with pytest.raises(ConfigError, match="1, 1000"):
        table(0)
