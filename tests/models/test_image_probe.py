"""The denoiser's probe: its figures against the same written out with merged weights, and its laws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from manylora import Adapter, Library
from manylora.errors import RequestError
from manylora.image.adapters import DiffusionModel
from manylora.models.attach import Attached, attach
from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base, run_unet
from manylora.models.diffusion_norms import module_norms
from manylora.models.image_probe import ImageProbe
from manylora.models.image_repair import MIN_FACTOR, repair, scaled
from manylora.models.image_verdict import judge_image, risk
from manylora.models.tiny_diffusion import tiny_sd
from manylora.models.verdict import Level
from tests.image.pictures import random_adapter

CAPTIONS = ("a cat", "the sun", "two green squares")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of these tests."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> DiffusionBase:
    return load_diffusion_base(tiny_sd(tmp_path_factory.mktemp("base") / "sd", prediction="v_prediction"))


@pytest.fixture(scope="module")
def adapters(base: DiffusionBase) -> dict[str, Adapter]:
    return {
        "one": random_adapter(base, 1),
        "two": random_adapter(base, 2, text=True),
        "fast": random_adapter(base, 3),
    }


@pytest.fixture(scope="module")
def lora(base: DiffusionBase, adapters: dict[str, Adapter]) -> Iterator[Attached]:
    library = Library()
    for name, adapter in adapters.items():
        library.add(name, adapter)
    with attach(DiffusionModel(base), library) as attached:
        yield attached


def probe(base: DiffusionBase, lora: Attached, reference: str | None = None) -> ImageProbe:
    return ImageProbe(base, lora, reference, captions=CAPTIONS)


def merged(
    base: DiffusionBase, adapters: Mapping[str, Adapter], mixture: Mapping[str, float]
) -> DiffusionBase:
    """A copy of the base with the deltas in its weights: another way than hooks to the same model."""
    copy = deepcopy(base)
    modules = dict(DiffusionModel(copy).named_modules())
    for name, weight in mixture.items():
        for site, pair in adapters[name].sites.items():
            with torch.no_grad():
                modules[site].weight += weight * pair.delta().view_as(modules[site].weight)
    return copy


def x0_of(model: DiffusionBase, latents: Tensor, timesteps: tuple[int, ...]) -> Tensor:  # [L, C, 4, h, w]
    condition = model.encode_prompts(CAPTIONS)
    rows = []
    for z, t in zip(latents, timesteps, strict=True):
        signal, sigma = model.schedule.alpha_bar[t].sqrt(), (1 - model.schedule.alpha_bar[t]).sqrt()
        with torch.no_grad():
            v = run_unet(model.unet, z.expand(3, *z.shape), torch.full((3,), t), condition)
        rows.append(signal * z - sigma * v)
    return torch.stack(rows).float()


def test_figures_are_those_of_merged_weights(base, lora, adapters):
    asked = probe(base, lora, "fast")
    result = asked.result({"one": 0.7, "two": 0.5})
    wanted = {
        name: x0_of(merged(base, adapters, {"fast": 1.0, **mixture}), asked._latents, asked.timesteps)
        for name, mixture in {
            "reference": {},
            "one": {"one": 0.7},
            "two": {"two": 0.5},
            "both": {"one": 0.7, "two": 0.5},
        }.items()
    }
    reference, both = wanted["reference"], wanted["both"]
    away = both - reference
    assert away.norm() / reference.norm() > 0.05, "the mixture changes something"
    assert result.mixture.divergence == pytest.approx(float(away.norm() / reference.norm()), rel=1e-3)
    by_level = [float(a.norm() / r.norm()) for a, r in zip(away, reference, strict=True)]
    assert result.mixture.divergence_by_level == pytest.approx(by_level, rel=1e-3)
    centred = [x - x.mean(1, keepdim=True) for x in (both, reference)]
    cosine = torch.nn.functional.cosine_similarity(centred[0].flatten(), centred[1].flatten(), dim=0)
    assert result.mixture.prompt_disagreement == pytest.approx(1 - float(cosine), abs=1e-4)
    assert result.mixture.prompt_gain == pytest.approx(
        float(centred[0].norm() / centred[1].norm()), rel=1e-3
    )
    parts = wanted["one"] - reference, wanted["two"] - reference
    additive = parts[0] + parts[1]
    assert result.non_additivity == pytest.approx(
        float((away - additive).norm() / additive.norm()), rel=1e-2
    )
    alone = [float(part.norm() / reference.norm()) for part in parts]
    assert [part.divergence for part in result.parts] == pytest.approx(alone, rel=1e-3)
    assert result.num_rows == 12
    assert result.reference == "fast:1"


def test_nothing_added_changes_nothing(base, lora):
    change = probe(base, lora, "fast").change(None)
    assert (change.divergence, change.roughness) == (0.0, 0.0)
    assert change.prompt_disagreement == pytest.approx(0.0, abs=1e-6)
    assert change.prompt_gain == pytest.approx(1.0)
    assert change.residual == probe(base, lora, "fast").result("one").reference_residual


def test_more_weight_is_more_of_every_harm(base, lora):
    asked = probe(base, lora)
    changes = [asked.change({"one": weight}) for weight in (0.1, 0.5, 2.0)]
    for figure in ("divergence", "prompt_disagreement"):
        values = [getattr(change, figure) for change in changes]
        assert 0 < values[0] < values[1] < values[2]
    assert sorted(map(risk, changes)) == list(map(risk, changes))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(base, lora):
    one, again = (probe(base, lora).change("one+two:0.5") for _ in range(2))
    assert one == again
    other = ImageProbe(base, lora, captions=CAPTIONS, seed=1).change("one+two:0.5")
    assert other.divergence != one.divergence


def test_one_caption_tells_nothing_of_prompts(base, lora):
    with pytest.raises(RequestError, match="at least 2 captions"):
        ImageProbe(base, lora, captions=["a cat"])


def test_what_overflows_is_broken(base, lora):
    result = probe(base, lora).result({"one": 1e30})
    assert result.mixture.divergence == float("inf")
    assert judge_image(result, ["one"]).level is Level.BROKEN


def test_the_verdict_names_its_evidence(base, lora):
    result = probe(base, lora).result({"one": 0.01, "two": 0.01})
    verdict = judge_image(result, ["one", "two"])
    assert verdict.level is Level.FINE
    told = "\n".join(map(str, (*verdict.findings, *verdict.remarks)))
    for expected in (
        "broken above",
        "non-additivity",
        "of the parts alone, '",
        "measured against base",
        "t=999",
    ):
        assert expected in told


def test_a_repair_is_the_strongest_that_the_probe_allows(base, lora):
    asked = probe(base, lora)
    heavy = {"one": 3.0, "two": 2.0}
    assert risk(asked.change(heavy)) > 0.8
    limit = 0.5 * (risk(asked.change(heavy)) + risk(asked.change(scaled_to(heavy, MIN_FACTOR))))
    found = repair(asked, heavy, limit=limit)
    assert found.mends
    assert MIN_FACTOR < found.factor < 1
    assert dict(found.mixture.weights) == pytest.approx(scaled_to(heavy, found.factor), abs=1e-3)
    assert risk(found.change) <= limit
    assert risk(asked.change(scaled_to(heavy, found.factor + 0.05))) > limit, "no more would have done"


def test_what_is_safe_needs_no_repair_and_what_never_is_gets_none(base, lora):
    asked = probe(base, lora)
    safe = repair(asked, {"one": 0.01})
    assert (safe.factor, safe.mends, dict(safe.mixture.weights)) == (1.0, True, {"one": 0.01})
    never = repair(asked, {"one": 1e6})
    assert (never.factor, never.mends) == (MIN_FACTOR, False)


def scaled_to(mixture: Mapping[str, float], factor: float) -> dict[str, float]:
    from manylora import Mixture

    return dict(scaled(Mixture.parse(mixture), factor).weights)


def test_norms_are_those_of_the_weights(base, lora):
    norms = module_norms(DiffusionModel(base), lora.sites)
    assert norms.keys() == set(lora.sites)
    conv = base.unet.conv_in.weight.detach().flatten(1)
    assert norms["conv_in"].frobenius == pytest.approx(float(conv.norm()))
    assert norms["conv_in"].spectral == pytest.approx(
        float(torch.linalg.matrix_norm(conv, ord=2)), rel=0.02
    )
    assert any(site.startswith("text_encoder.") for site in norms)
