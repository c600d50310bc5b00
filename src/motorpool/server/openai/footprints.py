"""The energy and CO2 of a request, beside its tokens: the object ``motorpool`` inside ``usage``.

An answer's body is the engine's own bytes; only its ``usage`` is opened here. Must not: compute energy, or change
anything else of a body. Called by: ``live``, ``chunks``, ``batches``, ``server.assembly``.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from motorpool.core.attribution import Footprint

NAME: Final = "motorpool"  # OpenAI has no field of this name, and its clients keep what they do not know
_fields: Final = msgspec.json.Decoder(dict[str, Raw])
_json: Final = msgspec.json.Encoder().encode


class ShownFootprint(msgspec.Struct, frozen=True, kw_only=True):
    """Watt-hours of the whole vehicle and grams of CO2; ``measured`` is false if any part of it is modelled."""

    energy_wh: float
    co2_g: float
    measured: bool


def shown(footprint: Footprint) -> ShownFootprint:
    """A footprint as customers see it."""
    return ShownFootprint(energy_wh=footprint.energy_wh, co2_g=footprint.co2_g, measured=footprint.is_measured)


def with_footprint(body: bytes, footprint: Footprint | None) -> bytes:
    """The body of an answer with its footprint inside ``usage``; unchanged if it has no such object."""
    if footprint is None:
        return body
    try:
        fields = _fields.decode(body)
        usage = _fields.decode(fields["usage"])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        return body
    usage[NAME] = Raw(_json(shown(footprint)))
    fields["usage"] = Raw(_json(usage))
    return _json(fields)
