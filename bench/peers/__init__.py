"""One module for each peer. Each runs as ``python -m bench.peers.NAME`` in that peer's own environment.

They use the standard library and the peer alone, and print one line of JSON when they are done.
"""
