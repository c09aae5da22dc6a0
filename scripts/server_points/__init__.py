"""The points of `make show-server`."""
