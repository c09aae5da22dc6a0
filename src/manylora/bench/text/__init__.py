"""Throughput of the text engine beside its peers and its ceilings."""
