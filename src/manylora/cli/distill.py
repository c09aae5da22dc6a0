"""`manylora distill`: a model's few-step acceleration as a LoRA."""

from typing import Annotated, Any

import typer

from manylora.cli.fields import command, field_docs, value_of
from manylora.distill.config import DistillConfig


def register(app: typer.Typer) -> None:
    @command(app, "distill", DistillConfig)
    def distill(
        base: Annotated[str, typer.Argument(help=field_docs(DistillConfig)["base"])], **values: Any
    ) -> None:
        """Distil a diffusion model into an LCM-LoRA: pictures in 1 to 8 steps, beside any style LoRA.

        The teacher is the model itself at its best guidance, over 50 steps; what is learnt is to jump to where it
        would arrive. Latents and text embeddings are computed once. Look at samples/ and at paired_rmse in
        metrics.jsonl of the run's folder as it goes. Run the same command again to resume a run that was interrupted.

        First find the guidance at which your model is best at 50 steps, and check that it is plainly worse at 4: a
        model that has learnt its pictures by heart has nothing to distil.

        Examples:

            manylora distill ./my-model --data pictures/ --out ./lcm --guidance 7.5

            manylora distill ./small-model --data pictures/ --out ./lcm --guidance 2.5 --rank 16

            manylora generate ./my-model "a cat" --lora lcm --steps 4
        """
        # PEFT, accelerate and diffusers are extras, and slow to import.
        from rich.console import Console

        from manylora.distill.output import RECORD
        from manylora.distill.trainer import distill as run
        from manylora.distill.trainer import load_base
        from manylora.train.image_encoded import encode_pictures
        from manylora.training.disk import disk_errors
        from manylora.training.out_folder import refuse_to_replace
        from manylora.training.sole_run import sole_run

        config, console = DistillConfig(base=base, **value_of(DistillConfig, values)), Console(stderr=True)
        refuse_to_replace(config.out, "distilled LoRA", (RECORD,))  # before minutes of encoding
        # The run takes the folder again; if another one has come in between, it is refused there.
        with disk_errors(config.run_folder, config.out), sole_run(config.run_folder):
            model = load_base(config)
            pictures = encode_pictures(
                config.data,
                model,
                config.size or model.default_size,
                config.skip_empty,
                config.run_folder / "pictures",
                console,
            )
        run(config, model, pictures, console)
