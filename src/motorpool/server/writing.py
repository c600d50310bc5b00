"""Writes the scheduler's commands into the books.

Every function works inside the loop's transaction. Called by: ``server.loop``. Must not: decide, send or commit.
"""

from __future__ import annotations

import sqlite3

import msgspec

from motorpool.core import events as ev
from motorpool.server.entries import Entry
from motorpool.store import books, owners


def write(db: sqlite3.Connection, command: ev.Command, entry: Entry, now_ms: int) -> bool:
    """Write one command; False if it changes no books, but is an act for after the commit."""
    return _write_work(db, command, entry, now_ms) or _write_counts(db, command, now_ms)


def _write_work(db: sqlite3.Connection, command: ev.Command, entry: Entry, now_ms: int) -> bool:
    """What concerns leases, lines and jobs."""
    match command:
        case ev.SaveResults():
            _save_results(db, command, entry)
        case ev.SaveLease():
            books.save_lease(db, command)
        case ev.SaveHeld():
            books.save_held(db, command)
        case ev.DropLease():
            books.drop_lease(db, command.lease_id)
        case ev.SaveCheckpoints():
            columns = (command.lines, command.tokens, command.shares, command.picks)
            for line, tokens, shares, place in zip(*columns, strict=True):
                key = books.line_key(command.job_no, line)
                books.save_checkpoint(db, key, tokens, entry.bodies[place], shares)
        case ev.SaveFailures():
            body = msgspec.json.encode({"code": command.code, "message": command.message})
            keys = [books.line_key(command.job_no, line) for line in command.lines]
            books.insert_results(db, [(key, 0, body, None, 0, 0, 0, 0, 0, 0, 0) for key in keys])
            books.drop_checkpoints(db, keys)
        case ev.SaveJobStatus():
            books.set_status(db, command.job_no, command.status, now_ms)
        case _:
            return False
    return True


def _write_counts(db: sqlite3.Connection, command: ev.Command, now_ms: int) -> bool:
    """What concerns totals, money and vehicles."""
    match command:
        case ev.SaveJobCounts():
            books.add_job_counts(db, command)
        case ev.SaveVehicleCounts():
            books.add_vehicle_counts(db, command, now_ms)
        case ev.PostTransfers():
            books.post_transfers(db, command.transfers, now_ms)
            books.save_rests(db, command.rests)
            if command.request_id:
                books.note_paid(db, command.request_id)
        case ev.SaveRegion():
            books.save_region(db, command.vehicle_id, command.region)
        case ev.SaveWithdrawal():
            owners.save_withdrawal(db, command.vehicle_id, seen=command.seen)
        case ev.DropStory():
            books.drop_story(db, command.subject)
        case _:
            return False
    return True


def _save_results(db: sqlite3.Connection, command: ev.SaveResults, entry: Entry) -> None:
    event = entry.event
    assert isinstance(event, ev.ResultsArrived)
    high = command.job_no << books.LINE_BITS
    picks = command.picks
    columns = (
        [high | event.lines[place] for place in picks],
        [event.statuses[place] for place in picks],
        [entry.bodies[place] for place in picks],
        [command.vehicle_id] * len(picks),
        [event.prompt_tokens[place] for place in picks],
        [event.completion_tokens[place] for place in picks],
        command.carried_tokens,
        command.costs_micro,
        command.energy_uwh,
        [int(command.energy_is_measured)] * len(picks),
        command.co2_ug,
    )
    books.insert_results(db, list(zip(*columns, strict=True)))
    books.drop_checkpoints(db, [high | line for line in command.with_checkpoint])
