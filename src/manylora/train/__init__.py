"""Ordinary LoRA fine-tuning, on PEFT and accelerate."""

from manylora.train.image import ImageTrainReport, train_image
from manylora.train.image_config import ImageTrainConfig
from manylora.train.text import TrainReport, train_text
from manylora.train.text_config import TextTrainConfig

__all__ = [
    "TextTrainConfig",
    "TrainReport",
    "train_text",
    "ImageTrainConfig",
    "ImageTrainReport",
    "train_image",
]
