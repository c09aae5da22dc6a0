"""What learns, what it leaves alone, and that what is written is what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.testing import assert_close

from manylora import Library, attach, load_adapter
from manylora.diffusion import consistency, ddim_step, denoised_from, guide
from manylora.distill.cost import training_bytes
from manylora.distill.learners import GUIDANCE, MAIN, DistilledLora, DistilledUnet
from manylora.distill.networks import UnetStudent, UnetTeacher
from manylora.distill.objective import ConsistencyObjective
from manylora.distill.output import write_result
from manylora.errors import AdapterMismatchError, ConfigError
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base, run_unet, run_unet_pair
from manylora.training.hardware import make_accelerator
from tests.distill.tiny import CAPTIONS, tiny_config
from tests.lora.unets import SD15, unet

T = torch.tensor([19, 519, 999])
PIPELINES: dict[str, Any] = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture
def base(base_folder: Path) -> DiffusionBase:
    return load_diffusion_base(base_folder)


def stir(learner: DistilledLora, scale: float = 0.1) -> None:
    """Take every lora_B away from zero."""
    for name, parameter in learner.parameters.items():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=scale)


def noise(base: DiffusionBase) -> Tensor:
    return torch.randn(3, *base.latent_shape())


def test_the_teacher_is_the_base_to_the_bit_and_the_student_is_not(
    base: DiffusionBase, tmp_path: Path
) -> None:
    z, condition = noise(base), base.encode_prompts(CAPTIONS[1:4])
    with torch.no_grad():
        before = run_unet(base.unet, z, T, condition)
        learner = DistilledLora(base.unet, tiny_config(Path("base"), tmp_path))
        assert torch.equal(run_unet(learner.unet, z, T, condition), before), "lora_B begins at zero"
        stir(learner)
        student = run_unet(learner.unet, z, T, condition)
        assert (student - before).abs().max() > 0.05, "the LoRA changes the output"
        with learner.teacher() as teacher:
            assert torch.equal(run_unet(teacher, z, T, condition), before)
        assert torch.equal(run_unet(learner.unet, z, T, condition), student), "the LoRA is on again"


def test_only_the_lora_learns_and_it_is_fp32(base_folder: Path, tmp_path: Path) -> None:
    base = load_diffusion_base(base_folder, dtype=torch.bfloat16)
    learner = DistilledLora(base.unet, tiny_config(base_folder, tmp_path, precision="bf16"))
    learning = {name for name, p in base.unet.named_parameters() if p.requires_grad}
    assert learning == learner.parameters.keys()
    assert learning
    assert {p.dtype for p in learner.parameters.values()} == {torch.float32}
    convs = [
        name for name in learning if "conv1" in name or "conv_shortcut" in name or "upsamplers" in name
    ]
    assert convs, "convolutions learn too"
    with learner.teacher():
        pass
    assert {name for name, p in base.unet.named_parameters() if p.requires_grad} == learning


def test_the_pair_is_one_pass_and_equals_two(base: DiffusionBase) -> None:
    z, condition = noise(base), base.encode_prompts(CAPTIONS[1:4])
    calls = []
    handle = base.unet.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    with torch.no_grad():
        pair = run_unet_pair(base.unet, z, T, condition, base.unconditional())
        handle.remove()
        apart = [run_unet(base.unet, z, T, c) for c in (condition, base.unconditional().expand(3))]
    assert calls == [6]
    assert (apart[0] - apart[1]).abs().max() > 1e-3, "the condition changes the output"
    for one, other in zip(pair, apart, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_unet_is_the_formula_on_its_outputs(base: DiffusionBase, tmp_path: Path) -> None:
    """The whole way, from latents to the loss, beside the same written out with the networks called one by one."""
    config = tiny_config(Path("base"), tmp_path, loss="l2")
    accelerator = make_accelerator("cpu", "fp32")
    condition, unconditional = base.encode_prompts(CAPTIONS[1:4]), base.unconditional()
    learner = DistilledLora(base.unet, config)
    stir(learner)
    student, teacher = UnetStudent(learner, accelerator), UnetTeacher(learner, unconditional, accelerator)
    objective = ConsistencyObjective(base.schedule, base.prediction, config.objective_config)
    latents = torch.randn(3, *base.latent_shape())
    draw = objective.draw(latents, torch.Generator().manual_seed(2))
    ours = objective.loss(student, teacher, student, latents, condition, draw)

    def x0(z: Tensor, t: Tensor) -> Tensor:
        output = run_unet(learner.unet, z, t, condition)
        return consistency(z, denoised_from(output, z, base.schedule.level(t, z), base.prediction).x0, t)

    t, landing = objective.start_t[draw.index], objective.landing_t[draw.index]
    level, to = base.schedule.level(t, latents), base.schedule.level(landing, latents)
    z = level.signal * latents + level.sigma * draw.noise
    with torch.no_grad():
        with learner.teacher() as unet_off:
            conditional, unguided = (
                denoised_from(run_unet(unet_off, z, t, c), z, level, base.prediction)
                for c in (condition, unconditional.expand(3))
            )
        wanted = x0(ddim_step(z, guide(conditional, unguided, 1.5), level, to), landing)
    assert_close(ours, (x0(z, t) - wanted).square().mean(), atol=1e-5, rtol=1e-4)
    ours.backward()
    assert all(p.grad is not None for p in learner.parameters.values())
    assert all(p.grad is None for n, p in base.unet.named_parameters() if n not in learner.parameters)


@pytest.mark.parametrize("alpha", [None, 7.0])
def test_what_is_written_gives_the_same_output_here_and_in_diffusers(
    base: DiffusionBase, base_folder: Path, tmp_path: Path, alpha: float | None
) -> None:
    config = tiny_config(base_folder, tmp_path, alpha=alpha)
    z, condition = noise(base), base.encode_prompts(CAPTIONS[1:4])
    learner = DistilledLora(base.unet, config)
    stir(learner)
    with torch.no_grad():
        want = run_unet(learner.unet, z, T, condition)
    write_result(learner, config, base_folder, {"w": 1.5})
    adapter = load_adapter(config.out)
    assert adapter.base_model == str(base_folder)
    assert {pair.scaling for pair in adapter.sites.values()} == {1.0 if alpha is None else 7 / 4}

    fresh = load_diffusion_base(base_folder)
    library = Library()
    library.add("lcm", adapter)
    with torch.no_grad():
        plain = run_unet(fresh.unet, z, T, condition)
        assert (plain - want).abs().max() > 0.05, "the LoRA changes the output"
        with attach(fresh.unet, library) as lora, lora.rows(["lcm"] * 3):
            assert_close(run_unet(fresh.unet, z, T, condition), want, atol=1e-5, rtol=1e-5)
        beside = {"safety_checker": None, "feature_extractor": None} if base.kind == "sd" else {}
        pipeline = PIPELINES[base.kind].from_pretrained(base_folder, **beside)
        pipeline.load_lora_weights(str(config.out))
        assert_close(run_unet(pipeline.unet, z, T, condition), want, atol=1e-5, rtol=1e-5)


def test_a_guidance_adapter_is_a_part_of_a_mixture(
    base: DiffusionBase, base_folder: Path, tmp_path: Path
) -> None:
    """w = 1 .. 5 is the weight -1 .. 1 of the second adapter, as the student sees it and as it is served."""
    config = tiny_config(base_folder, tmp_path, guidance=2.0, max_guidance=6.0, alpha=6.0)
    z, condition = noise(base), base.encode_prompts(CAPTIONS[1:4])
    learner = DistilledLora(base.unet, config)
    stir(learner)
    student = UnetStudent(learner, make_accelerator("cpu", "fp32"))
    write_result(learner, config, base_folder, {})
    library = Library()
    library.add("lcm", load_adapter(config.out))
    library.add("by-guidance", load_adapter(config.out / GUIDANCE))
    fresh = load_diffusion_base(base_folder)
    outputs = []
    with torch.no_grad(), attach(fresh.unet, library) as lora:
        for w, weight in ((1.0, -1.0), (3.0, 0.0), (4.0, 0.5)):
            outputs.append(student(z, T, condition, torch.full((3,), w)))
            with lora.rows([{"lcm": 1.0, "by-guidance": weight}] * 3):
                assert_close(run_unet(fresh.unet, z, T, condition), outputs[-1], atol=1e-5, rtol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01, "w changes the output"
    adapters = learner.adapters()
    assert adapters[MAIN].identity != adapters[GUIDANCE].identity


def test_a_lora_of_another_base_is_refused(
    base: DiffusionBase, other_base_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    learner = DistilledLora(base.unet, tiny_config(base_folder, tmp_path))
    stir(learner)
    library = Library()
    library.add("lcm", learner.adapters()[MAIN])
    other = load_diffusion_base(other_base_folder)
    with pytest.raises(AdapterMismatchError, match="lcm"), attach(other.unet, library) as lora:
        with lora.rows(["lcm"]), torch.no_grad():
            run_unet(other.unet, noise(other)[:1], T[:1], other.encode_prompts(["a cat"]))


def test_targets_that_the_unet_does_not_have_are_named(base: DiffusionBase, tmp_path: Path) -> None:
    config = tiny_config(Path("base"), tmp_path, targets=("to_q", "q_proj"))
    with pytest.raises(ConfigError, match=r"targets \['q_proj'\] are no Linear or Conv2d"):
        DistilledLora(base.unet, config)


def test_the_whole_unet_learns_beside_a_frozen_copy(base: DiffusionBase) -> None:
    z, condition = noise(base), base.encode_prompts(CAPTIONS[1:4])
    with torch.no_grad():
        before = run_unet(base.unet, z, T, condition)
        learner = DistilledUnet(base.unet)
        learner.unet.conv_out.bias += 0.5
        assert not torch.equal(run_unet(learner.unet, z, T, condition), before)
        with learner.teacher() as teacher:
            assert torch.equal(run_unet(teacher, z, T, condition), before)
    assert len(learner.parameters) == len(list(base.unet.parameters()))


def test_a_lora_takes_at_most_half_the_memory_at_full_size(tmp_path: Path) -> None:
    """SD 1.5's UNet on the meta device, rank 64, with an average of what learns: 859.5M and 67.25M parameters."""
    config = tiny_config(Path("sd15"), tmp_path, rank=64)
    num_base, num_lora = 859_520_964, 67_252_224
    with torch.device("meta"):
        full = training_bytes(DistilledUnet(unet(SD15, device="meta")), ema=True)
        lora = training_bytes(DistilledLora(unet(SD15, device="meta"), config), ema=True)
    assert full.total == 4 * 6 * num_base
    assert lora.total == 4 * (num_base + 5 * num_lora)
    assert (lora.parameters, lora.optimizer) == (4 * (num_base + num_lora), 8 * num_lora)
    assert lora.total <= 0.5 * full.total
    assert "4.78 GB" in str(replace(lora))
