"""The public names are exactly these, and each can be had."""

import manylora


def test_every_public_name_can_be_imported() -> None:
    for name in manylora.__all__:
        assert getattr(manylora, name) is not None


def test_the_public_names_are_frozen() -> None:
    assert sorted(manylora.__all__) == [
        "Adapter", "Attached", "Completion", "Composition", "DiffusionBase", "Engine", "EngineConfig", "ImageEngine",
        "ImageEngineConfig", "ImageParams", "Library", "LoraPair", "Mixture", "Output", "Picture", "SamplingParams",
        "__version__", "attach", "components", "compose", "load_adapter", "load_diffusion_base", "load_model",
        "load_peft", "load_tokenizer", "save_adapter", "save_peft",
    ]  # fmt: skip
