"""llama.cpp, through the module ``xllamacpp``: whole models on the processor, several requests at once.

Decides: how the model is loaded and which attempt gets a slot. Must not: run in the agent's process, listen on a port,
write requests to its log. Called by: ``host``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

from motorpool.agent.runtime import answer, embedding
from motorpool.agent.runtime.answer import fingerprint
from motorpool.agent.runtime.backend import Emit
from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Ready, Work
from motorpool.agent.runtime.llama_embed import EmbedRun
from motorpool.agent.runtime.llama_run import Model, Run
from motorpool.agent.runtime.llama_socket import SocketFolder
from motorpool.agent.runtime.spec import EngineSpec
from motorpool.catalogue.gguf import read_entries
from motorpool.errors import EngineError, ModelFileError, SetupError
from motorpool.types import Kind

_POOLING: Final = ".pooling_type"  # the entry of a model's file that makes it one for embeddings
_BEGINS: Final = "tokenizer.ggml.cls_token_id"
_ENDS: Final = "tokenizer.ggml.seperator_token_id"  # the format spells it so
# From 64 tokens in a batch on, llama.cpp reckons attention in another way, and the same prompt comes out otherwise by
# what was read together with it: greedy answers would depend on what the vehicle did before. Below, they do not, at a
# price of a few percent of the speed of reading; and a request that nobody wants any more is noticed while it is read.
BATCH_TOKENS: Final = 48
_SPEAKS: Final = frozenset({"avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "sve", "i8mm"})


class LlamaBackend:
    """One model with ``slots`` attempts at a time, each in a thread that mostly waits for llama.cpp."""

    def __init__(self, spec: EngineSpec, emit: Emit) -> None:
        self._spec = spec
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._slots = spec.slots
        self._threads = ThreadPoolExecutor(max_workers=spec.slots, thread_name_prefix="slot")
        self._model: Model | None = None
        self._queue: deque[Work] = deque()
        self._running: dict[str, Run | EmbedRun] = {}

    async def load(self) -> Ready:
        """Check the file's hash and load it."""
        self._model = await self._loop.run_in_executor(self._threads, _load, self._spec)
        self._fill()
        return Ready(
            model=self._spec.model,
            slots=self._spec.slots,
            context_tokens=self._spec.context_tokens,
            fingerprint=self._model.fingerprint,
        )

    def submit(self, work: list[Work]) -> None:
        """Queue attempts; one that goes on from a held place comes first, as that place is its own."""
        held = {run.work.response_id for run in self._running.values() if isinstance(run, Run) and run.holds}
        self._queue.extendleft([one for one in reversed(work) if one.response_id in held])
        self._queue.extend(one for one in work if one.response_id not in held)
        self._fill()

    def cancel(self, keys: list[str]) -> None:
        """Stop attempts: queued ones now, running ones at their next token."""
        wanted = set(keys)
        queued = [work.key for work in self._queue if work.key in wanted]
        if queued:
            self._queue = deque(work for work in self._queue if work.key not in wanted)
            self._emit([Cancelled(key=key) for key in queued])
        for key in wanted & self._running.keys():
            self._running[key].cancelled = True

    def limit(self, slots: int) -> None:
        """Have fewer attempts at a time, or more again."""
        self._slots = max(1, min(slots, self._spec.slots))
        self._fill()

    def _fill(self) -> None:
        while self._model is not None and self._queue and len(self._running) < self._slots:
            work = self._queue.popleft()
            embeds = work.kind is Kind.EMBEDDING
            if embeds != self._model.embeds:
                wrong = embedding.wrong_model(self._spec.model, embeds=self._model.embeds)
                self._emit([answer.failed(work.key, wrong)])
                continue
            run = (EmbedRun if embeds else Run)(self._model, work, self._post)
            self._running[work.key] = run
            self._loop.run_in_executor(self._threads, run.run).add_done_callback(
                lambda _done, key=work.key: self._over(key)  # type: ignore[misc]  # the default binds the key
            )

    def _post(self, events: list[EngineEvent]) -> None:
        """From a worker thread."""
        self._loop.call_soon_threadsafe(self._emit, events)

    def _over(self, key: str) -> None:
        del self._running[key]
        self._fill()


def _load(spec: EngineSpec) -> Model:
    """Load the model; raise ModelFileError if the file is not the one that the catalogue names.

    llama.cpp reads the file that was checked, and not once more whatever has its name by then.
    """
    path = Path(spec.model_path)
    remedy = f"fetch it with: motorpool models pull {spec.model} --force"
    try:
        file = path.open("rb")
    except OSError as error:
        raise ModelFileError(f"the model file {path} cannot be read ({error.strerror}); {remedy}") from error
    with file:
        before = _written(file)
        try:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelFileError(f"the model file {path} cannot be read ({error.strerror}); {remedy}") from error
        if spec.model_sha256 and digest != spec.model_sha256:
            raise ModelFileError(f"the model file {path} is not the one that the catalogue names; {remedy}")
        model = _serve(spec, file, digest)
        if _written(file) != before:
            raise ModelFileError(f"the model file {path} was written to while it was loaded; {remedy}")
    return model


def _written(file: IO[bytes]) -> tuple[int, int]:
    """When a file was last written to, and how long it is."""
    status = os.fstat(file.fileno())
    return status.st_mtime_ns, status.st_size


def _serve(spec: EngineSpec, file: IO[bytes], digest: str) -> Model:
    """llama.cpp with the model in ``file``."""
    try:
        import xllamacpp  # noqa: PLC0415  # a hundred megabytes that only this process needs
    except ImportError as error:
        raise SetupError("the llama engine is not installed; install it with: pip install motorpool[llama]") from error
    embeds, edges = _embeds(file)
    folder = SocketFolder()
    try:
        params = _parameters(xllamacpp.CommonParams(), spec, folder.path)
        if embeds:  # how the tokens become one vector is read from the file
            params.embedding = True
            params.n_ubatch = params.n_batch = max(spec.context_tokens, params.n_ubatch)  # an input is never cut in two
        params.model.path = f"/proc/self/fd/{file.fileno()}"
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        folder.remove()
        raise EngineError(
            f"llama.cpp cannot load the model file {spec.model_path}{_within(spec)}; "
            f"fetch it with: motorpool models pull {spec.model} --force"
        ) from error
    name = fingerprint("llama.cpp", xllamacpp.__version__, digest, BATCH_TOKENS, platform.machine(), *_instructions())
    return Model(spec=spec, server=server, socket=folder.hide(), fingerprint=name, embeds=embeds, edges=edges)


def _embeds(file: IO[bytes]) -> tuple[bool, tuple[list[int], list[int]]]:
    """Whether the model in ``file`` makes embeddings, and the tokens that its inputs begin and end with."""
    file.seek(0)
    try:
        about = read_entries(file, (_POOLING, _BEGINS, _ENDS))
    except ModelFileError:  # llama.cpp will say so as well
        return False, ([], [])
    marks = [[int(about[name])] if name in about else [] for name in (_BEGINS, _ENDS)]
    return any(name.endswith(_POOLING) for name in about), (marks[0], marks[1])


def _within(spec: EngineSpec) -> str:
    """What else than the file can be at fault."""
    if spec.memory_bytes <= 0:
        return ""
    return f", or cannot do so in {spec.memory_bytes} bytes of memory: allow more, or take a smaller model"


def _parameters(params: Any, spec: EngineSpec, socket_path: str) -> Any:
    params.hostnames = [socket_path]
    params.n_parallel = spec.slots
    params.n_ctx = spec.slots * spec.context_tokens
    params.n_batch = params.n_ubatch = BATCH_TOKENS
    params.cpuparams.n_threads = spec.threads
    params.cpuparams_batch.n_threads = spec.threads
    params.n_gpu_layers = 0
    params.fit_params = False  # it would make the context smaller on its own account
    params.cache_ram_mib = 0  # the owner's memory: no store of old prompts beside the slots
    params.warmup = False
    params.ui = False
    params.endpoint_slots = False
    params.verbosity = 0  # from 1 on, grammars and prompts reach the log
    return params


def _instructions() -> list[str]:
    """The processor's instruction sets that change the last bits of a product."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return sorted(_SPEAKS.intersection(flags))
