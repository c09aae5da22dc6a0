"""LoRAs of categories, and which sets of LoRAs break few-step pictures."""
