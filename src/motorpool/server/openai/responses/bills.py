"""Who made what of a background response, over all its runs: what the next run goes on with, and what is to be paid.

What a vehicle made is written down in the transaction that keeps its text, and paid in the one that keeps the end of
the response. So a response that was broken off is neither begun anew nor paid twice, wherever the process ended. Must
not: run a response, or know prices. Called by: ``log``, ``runs``.
"""

from __future__ import annotations

from motorpool.core import events as ev
from motorpool.core.pricing import Price, Shares, extend
from motorpool.server.cell import Carried
from motorpool.server.live_call import count_of
from motorpool.server.openai.responses.narration import Made
from motorpool.wire import Delta


class Tab:
    """What the latest run has made, as far as it is written down.

    ``energy_uwh``: what vehicles drew for runs that were broken off in this process.
    """

    def __init__(self) -> None:
        self.run = 0
        self.shares: Shares = []
        self.energy_uwh: dict[str, int] = {}
        self._chars = 0
        self._tokens = 0
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None

    def take(self, made: Made) -> None:
        """One more part; the first one of a run that began anew replaces all of the one before."""
        if made.run != self.run:
            self.run = made.run
            self.shares, self._token_ids = [], []
            self._chars = self._tokens = 0
            self._finish_reason = None
        self.shares = extend(self.shares, made.vehicle_id, made.tokens)
        self._chars += made.chars
        self._tokens += made.tokens
        self._token_ids += made.token_ids
        self._finish_reason = made.finish_reason or self._finish_reason

    def carried(self, text: str, logprobs: bytes) -> Carried:
        """From where the next run goes on after ``text``; empty, so that it begins anew, if others have made that."""
        if not text or not self._tokens or self._chars != len(text):
            return Carried(energy_uwh=self.energy_uwh)
        known = len(self._token_ids) == self._tokens  # some engines do not report them
        return Carried(
            text=text,
            tokens=self._tokens,
            token_ids=self._token_ids if known else [],
            logprobs=logprobs,
            finish_reason=self._finish_reason,
            shares=self.shares,
            energy_uwh=self.energy_uwh,
        )

    def bill(self, response_id: str, account: str, price: Price) -> ev.LiveEnded | None:
        """What is to be paid for a response that ends before its answer does: tokens, and nothing for the prompt."""
        if not self.shares:
            return None
        return ev.LiveEnded(
            cause_id=response_id,
            request_id=response_id,
            account=account,
            price=price,
            prompt_tokens=0,
            completion_tokens=self._tokens,
            finisher=self.shares[-1][0],
            shares=self.shares,
            energy_uwh=self.energy_uwh,
        )


class Maker:
    """What one run has made and is not written down yet."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._parts: list[Made] = []

    def add(self, vehicle_id: str, delta: Delta) -> None:
        """A vehicle said this; what no vehicle said is nobody's."""
        if not vehicle_id:
            return
        part = Made(self._run, vehicle_id, len(delta.text), count_of(delta), list(delta.token_ids), delta.finish_reason)
        last = self._parts[-1] if self._parts else None
        if last is not None and last.vehicle_id == vehicle_id:
            self._parts.pop()
            part = Made(
                self._run,
                vehicle_id,
                last.chars + part.chars,
                last.tokens + part.tokens,
                last.token_ids + part.token_ids,
                part.finish_reason or last.finish_reason,
            )
        self._parts.append(part)

    def parts(self) -> list[Made]:
        """All of it, once: one part for each vehicle in turn."""
        parts, self._parts = self._parts, []
        return parts
