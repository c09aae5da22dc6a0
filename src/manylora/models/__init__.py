"""Base models and what attaches adapters to them: the Llama family of decoders, loading, tiny models."""
