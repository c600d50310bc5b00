"""Makes the engine that a spec describes.

Decides: which class runs which spec. Must not: start it. Called by: the agent.
"""

from __future__ import annotations

from motorpool.agent.runtime.engine import Engine
from motorpool.agent.runtime.hosted import HostedEngine
from motorpool.agent.runtime.null import InlineNullEngine
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.errors import SetupError


def build_engine(spec: EngineSpec) -> Engine:
    """The engine of ``spec``, not yet started; raise SetupError for a spec that no engine can run."""
    if spec.slots < 1 or spec.threads < 1 or spec.context_tokens < 1:
        raise SetupError("an engine needs at least one slot, one thread and one token of context")
    if spec.backend is Backend.LLAMA and not spec.model_path:
        raise SetupError(f"the model {spec.model} has no file; fetch it with: motorpool models pull {spec.model}")
    if spec.backend is Backend.REMOTE and not spec.url.startswith(("http://", "https://")):
        raise SetupError("a remote engine needs the http:// or https:// address of an OpenAI-compatible server")
    if spec.hosted:
        return HostedEngine(spec)
    if spec.backend is not Backend.NULL:
        raise SetupError("only the null engine can run in the agent's own process")
    return InlineNullEngine(spec)
