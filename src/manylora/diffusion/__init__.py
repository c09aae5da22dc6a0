"""The mathematics of diffusion: schedule, predictions, guidance, solvers, consistency, samplers.

Pure functions of tensors. Knows no network, adapter, request or file: networks come as callables.
"""

from manylora.diffusion.consistency import boundary_scalings, consistency
from manylora.diffusion.guidance import (
    Denoiser,
    Network,
    PairNetwork,
    denoiser,
    guidance_weight,
    guide,
    guided_denoiser,
)
from manylora.diffusion.prediction import Denoised, Prediction, denoised_from, output_from
from manylora.diffusion.sampling import (
    NoiseSource,
    SamplingStep,
    last_latent,
    lcm_sample,
    solve,
    unipc_sample,
)
from manylora.diffusion.schedule import NoiseLevel, NoiseSchedule, add_noise, clean_level
from manylora.diffusion.solvers import (
    PastStep,
    Solver,
    StepStart,
    ddim_step,
    dpm_solver_pp_2m_step,
    euler_step,
    unipc_correction,
)
from manylora.diffusion.timesteps import (
    landing_grid,
    lcm_timesteps,
    solver_grid,
    started_by,
    trailing_timesteps,
)

__all__ = [
    "NoiseSchedule",
    "NoiseLevel",
    "clean_level",
    "add_noise",
    "Prediction",
    "Denoised",
    "denoised_from",
    "output_from",
    "Denoiser",
    "Network",
    "PairNetwork",
    "guidance_weight",
    "guide",
    "denoiser",
    "guided_denoiser",
    "solver_grid",
    "landing_grid",
    "lcm_timesteps",
    "trailing_timesteps",
    "started_by",
    "Solver",
    "PastStep",
    "StepStart",
    "ddim_step",
    "euler_step",
    "dpm_solver_pp_2m_step",
    "unipc_correction",
    "boundary_scalings",
    "consistency",
    "NoiseSource",
    "SamplingStep",
    "solve",
    "unipc_sample",
    "lcm_sample",
    "last_latent",
]
