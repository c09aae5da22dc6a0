"""The HTTP server. Two processes: one runs the engine, the other answers HTTP; each module says which it belongs to.

Read in this order: config, messages, channel, engine_process (the engine's side), engine_client and request_stream (the
API's side), launch; then app. Nothing that the API process imports may import torch.
"""
