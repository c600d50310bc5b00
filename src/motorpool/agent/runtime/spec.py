"""What an engine is to run: one frozen value, made at the edge from the configuration.

Decides nothing. Must not: read the environment, open files. Called by: the command line and the agent, which hand it
to ``build_engine``; it travels to the engine's process as the first message.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

REMOTE_SILENCE_S: Final = 600.0  # of a remote server: a long prompt takes long before its first token


class Backend(StrEnum):
    """The kinds of engine."""

    LLAMA = "llama"  # llama.cpp in a child process
    NULL = "null"  # deterministic words at a set rate, without a model
    REMOTE = "remote"  # any OpenAI-compatible server by URL


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: which backend, which model, how much of the machine.

    ``model`` is the catalogue's id and stands in every answer. ``context_tokens`` is what one slot can hold, prompt and
    answer together. ``threads`` beyond the free cores make llama.cpp many times slower, so it is what the permit gives.
    ``rate_tokens_per_s`` (null engine; per slot) 0 means as fast as possible, ``default_tokens`` is the length of a
    null answer when the request names none. ``url``, ``remote_model`` and ``api_key_env`` (the name of an environment
    variable that holds the key) belong to the remote backend. ``hosted`` False keeps a null engine in the caller's
    process. ``log_path`` takes what llama.cpp says on stderr; it is dropped if None. ``idle_priority`` lets every
    other process of the machine go first, to the point of getting nothing where others want every core; that is what a
    vehicle's computer needs. Several simulated vehicles on one computer share it fairly without. The null engine has
    nothing to give way with. ``memory_bytes`` is the most that the process may take, 0 for no limit. An engine process
    that its agent has not let go on for ``silence_s`` is ended: an agent that hangs cannot stop it any more. The agent
    takes it from how often its guard looks; 0 is for engines that no agent watches over, as in measurements.
    """

    backend: Backend
    model: str
    model_path: str = ""
    model_sha256: str = ""
    slots: int = 4
    threads: int = 1
    context_tokens: int = 2048
    rate_tokens_per_s: float = 0.0
    default_tokens: int = 16
    url: str = ""
    remote_model: str = ""
    api_key_env: str = ""
    hosted: bool = True
    log_path: str | None = None
    idle_priority: bool = True
    silence_s: float = 0.0
    memory_bytes: int = 0
