"""Makes the engine that a spec describes.

Decides: which class runs which spec. Must not: start it. Called by: the agent.
"""

from __future__ import annotations

from motorpool.agent.runtime.engine import Died, Engine, EngineEvent, OnEvents, Watched, Work
from motorpool.agent.runtime.hosted import HostedEngine
from motorpool.agent.runtime.limits import Isolation
from motorpool.agent.runtime.null import InlineNullEngine
from motorpool.agent.runtime.spec import Backend, EngineSpec
from motorpool.core.energy import Limits
from motorpool.errors import EngineError, SetupError


def build_engine(spec: EngineSpec) -> Engine:
    """The engine of ``spec``, not yet started; raise SetupError for a spec that no engine can run."""
    if spec.slots < 1 or spec.threads < 1 or spec.context_tokens < 1:
        raise SetupError("an engine needs at least one slot, one thread and one token of context")
    if spec.memory_bytes < 0:
        raise SetupError("an engine's memory is limited to a number of bytes, or not at all by 0")
    if spec.backend is Backend.LLAMA and not spec.model_path:
        raise SetupError(f"the model {spec.model} has no file; fetch it with: motorpool models pull {spec.model}")
    if spec.backend is Backend.REMOTE and not spec.url.startswith(("http://", "https://")):
        raise SetupError("a remote engine needs the http:// or https:// address of an OpenAI-compatible server")
    if spec.hosted:
        return HostedEngine(spec)
    if spec.backend is not Backend.NULL:
        raise SetupError("only the null engine can run in the agent's own process")
    return InlineNullEngine(spec)


def build_engines(specs: dict[str, EngineSpec], default: str) -> SwitchableEngine:
    """One engine that runs one of several models at a time, by their names; raise SetupError as ``build_engine``."""
    if default not in specs:
        raise SetupError(f"the engine's first model, {default}, is none of those that it has")
    return SwitchableEngine({name: build_engine(spec) for name, spec in specs.items()}, default)


class SwitchableEngine:
    """An engine with a choice of models, of which one at most is loaded. The choice counts from the next start."""

    def __init__(self, engines: dict[str, Engine], default: str) -> None:
        self._engines = engines
        self._chosen = default
        self._running = engines[default]
        self._started = False

    @property
    def model(self) -> str:
        """The model of the next start."""
        return self._chosen

    @property
    def isolation(self) -> Isolation | None:
        """What holds the latest process to its limits; None where there is none."""
        return self._running.isolation if isinstance(self._running, HostedEngine) else None

    def select(self, model: str) -> None:
        """Load this model at the next start; one that runs goes on as it is. Raise EngineError for an unknown one."""
        if model not in self._engines:
            raise EngineError(f"this vehicle has no model {model}; it has: {', '.join(sorted(self._engines))}")
        self._chosen = model

    async def start(self, on_events: OnEvents) -> None:
        """Load the model that was selected. Whatever else was loaded must have been killed, and leaves in parallel."""
        if self._started:
            raise EngineError("the engine is already started")

        def heard(events: list[EngineEvent]) -> None:
            if any(isinstance(event, Died) for event in events):
                self._started = False
            on_events(events)

        self._running = self._engines[self._chosen]
        self._started = True
        await self._running.start(heard)

    def submit(self, work: list[Work]) -> None:
        """Queue attempts."""
        self._running.submit(work)

    def cancel(self, keys: list[str]) -> None:
        """Stop attempts."""
        self._running.cancel(keys)

    def freeze(self) -> None:
        """Stop all computing at once."""
        self._running.freeze()

    def thaw(self) -> None:
        """Go on."""
        self._running.thaw()

    def kill(self) -> None:
        """End it at once."""
        self._started = False
        self._running.kill()

    def limit(self, limits: Limits) -> None:
        """Hold it to these limits, whichever model it has or will have."""
        for engine in self._engines.values():
            engine.limit(limits)

    def beat(self) -> None:
        """It may go on for a while."""
        if isinstance(self._running, Watched):
            self._running.beat()

    def busy_ms(self) -> int:
        """Engine time since the start."""
        return self._running.busy_ms()

    def cpu_ms(self) -> int:
        """Processor time since the start."""
        return self._running.cpu_ms()

    async def close(self) -> None:
        """Kill and release everything."""
        self.kill()
        for engine in self._engines.values():
            await engine.close()
