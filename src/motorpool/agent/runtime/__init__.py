"""Engines: what turns a request body into an answer, each behind the protocol of ``engine.py``."""

from __future__ import annotations

from motorpool.agent.runtime.build import build_engine
from motorpool.agent.runtime.spec import Backend, EngineSpec

__all__ = ["Backend", "EngineSpec", "build_engine"]
