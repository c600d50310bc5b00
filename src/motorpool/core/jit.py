"""One source for two speeds: kernels run as they stand, or compiled by numba for a large fleet.

A kernel is a plain function over numpy arrays, integers and floats. Marked with ``kernel`` it stays what it is, so a
small cell needs no compiler and no seconds to warm one up. ``compiled`` makes, from the same source, a namespace in
which all kernels are machine code and call each other as such. Both give the same results to the last bit: kernels take
integers and floats out of arrays with ``int`` and ``float`` before they reckon, use ``math`` rather than numpy for
functions, and sort nothing by floats.

Called by: ``core.kernels``, ``core.scheduler``, the simulator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, Final, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_KERNELS: Final[dict[Callable[..., Any], str]] = {}
_ALLOCATING: Final[set[Callable[..., Any]]] = set()
_COMPILED: Final[dict[str, SimpleNamespace]] = {}


def kernel(function: F) -> F:
    """Mark a function that ``compiled`` may turn into machine code. It makes no arrays: see ``allocating_kernel``."""
    _KERNELS[function] = function.__name__
    return function


def allocating_kernel(function: F) -> F:
    """The same for one that makes arrays.

    Only these count who refers to an array, and are called rather than put in place. The others are handed some forty
    arrays and keep none: counting and handing over took more than two thirds of their time.
    """
    _ALLOCATING.add(function)
    return kernel(function)


def compiled(module: ModuleType) -> SimpleNamespace:
    """The kernels of a module, compiled at their first call and kept on disk; everything else of it as it is.

    Kernels that the module has imported from other modules are compiled with it. With ``NUMBA_DISABLE_JIT=1`` numba
    hands the functions back as they are. Needs numba (ImportError without it).
    """
    known = _COMPILED.get(module.__name__)
    if known is not None:
        return known
    import numba  # noqa: PLC0415 - heavy, and only a large cell or a simulation needs it

    names = dict(vars(module))
    mark = _mark(module)
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value in _KERNELS:
            own = value.__module__ == module.__name__
            fast = None if own else getattr(compiled(_module_of(value)), value.__name__)
            if fast is None:
                plain = FunctionType(value.__code__, names, name, value.__defaults__)
                plain.__qualname__ = f"{name}-{mark}"
                options: dict[str, Any] = {} if value in _ALLOCATING else {"_nrt": False, "forceinline": True}
                fast = numba.njit(plain, cache=True, **options)
            names[name] = fast
    _COMPILED[module.__name__] = SimpleNamespace(**names)
    return _COMPILED[module.__name__]


def _module_of(function: Callable[..., Any]) -> ModuleType:
    import sys  # noqa: PLC0415 - a module by its name

    return sys.modules[function.__module__]


def _mark(module: ModuleType) -> str:
    """Of all kernels that those of a module can call: numba's cache looks at the file of each one alone.

    Without it a changed kernel would go on running as it was wherever one of another file calls it.
    """
    found = hashlib.sha256()
    todo, seen = [module], set[str]()
    while todo:
        at = todo.pop()
        if at.__name__ in seen:
            continue
        seen.add(at.__name__)
        for name, value in sorted(vars(at).items()):
            if isinstance(value, FunctionType) and value in _KERNELS:
                found.update(repr((name, value.__code__.co_code, value.__code__.co_consts)).encode())
                todo.append(_module_of(value))
            elif isinstance(value, (int, float)):
                found.update(repr((name, value)).encode())
    return found.hexdigest()[:12]
