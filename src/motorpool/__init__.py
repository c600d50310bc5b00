"""Motorpool: a compute cloud of parked electric vehicles, behind an OpenAI-compatible API."""

__version__ = "0.1.0"
