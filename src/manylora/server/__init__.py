"""The HTTP server. Two processes: one runs the engine, one answers HTTP; this package's modules say which they belong to.

Read in this order: config, messages, channel, engine_process (the engine's side), engine_client (the API's side), launch.
Nothing that the API process imports may import torch.
"""
