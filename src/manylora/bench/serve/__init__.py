"""A server under an open-loop load."""
