"""The models that may be asked for, as the catalogue names them.

Called by: ``app``. Must not: say where a model is loaded.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from motorpool.catalogue import Model
from motorpool.server.cell import Cell
from motorpool.server.openai.exchange import Exchange


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """A model as a customer sees it; ``created`` in seconds since 1970 (UTC)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def model_object(model: Model) -> ModelObject:
    """The customer's view of a model in the catalogue."""
    return ModelObject(id=model.id, created=model.created_s, owned_by=model.owned_by)


class ModelRoutes:
    """The routes under /v1/models."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    async def page(self, exchange: Exchange, _: str) -> None:
        """GET /v1/models."""
        models = self._cell.catalogue.models
        await exchange.answer_object(ModelList(data=[model_object(models[name]) for name in sorted(models)]))

    async def show(self, exchange: Exchange, model_id: str) -> None:
        """GET /v1/models/{model}; an id may hold slashes. Raises NotFoundError ``model_not_found``."""
        await exchange.answer_object(model_object(self._cell.catalogue.get(model_id)))
