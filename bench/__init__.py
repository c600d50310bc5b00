"""Benchmarks: Motorpool beside its peers on one machine. Nothing here is part of the product."""
