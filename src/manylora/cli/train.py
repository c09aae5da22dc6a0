"""`manylora train`: ordinary LoRA fine-tuning."""

from typing import Any

import typer

from manylora.cli.fields import command, value_of
from manylora.train.image_config import ImageTrainConfig
from manylora.train.text_config import TextTrainConfig


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Train ordinary LoRAs; a killed run goes on where it stopped.", no_args_is_help=True
    )
    app.add_typer(group, name="train")

    @command(group, "text", TextTrainConfig)
    def text(**values: Any) -> None:
        """Fine-tune a language model into a LoRA, from JSONL rows of chat messages or prompt and completion.

        Writes a PEFT directory. Run the same command again to resume a run that was interrupted.

        Example:

            manylora train text --model smollm2-135m-instruct --data rows.jsonl --out my-adapter --rank 4
        """
        # PEFT and accelerate are an extra of their own, and slow to import.
        from manylora.train.text import train_text

        train_text(TextTrainConfig(**value_of(TextTrainConfig, values)))

    @command(group, "image", ImageTrainConfig)
    def image(**values: Any) -> None:
        """Fine-tune a diffusion model's UNet into a LoRA, from captioned pictures: a style, or a subject.

        Writes diffusers' or PEFT's files. Run the same command again to resume a run that was interrupted.

        Example:

            manylora train image --model path/to/pipeline --data pictures --out papercut --rank 8
        """
        from manylora.train.image import train_image

        train_image(ImageTrainConfig(**value_of(ImageTrainConfig, values)))
