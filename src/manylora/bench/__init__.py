"""Workloads and measurements. Imports the engines; nothing of an engine imports it."""
