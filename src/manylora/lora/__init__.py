"""The adapter as data: what it is, where it lies, how several become one. Runs no model, knows no page."""

from manylora.lora.adapter import Adapter, AdapterId, LoraPair
from manylora.lora.mixture import BASE, Mixture

__all__ = ["Adapter", "AdapterId", "LoraPair", "Mixture", "BASE"]
