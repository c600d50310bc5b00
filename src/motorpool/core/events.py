"""What happens to the scheduler (events, in the past tense) and what it wants done (commands, imperative).

Events hold references and counts, never bodies. Every event has a ``cause_id``, which the story of a vehicle or job
repeats. Commands that begin with ``Save``, ``Drop``, ``Post`` or ``Note`` change the books and are committed first; the
others are performed after the commit.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from motorpool.core.ledger import Transfer
from motorpool.core.pricing import Price, Shares
from motorpool.core.sheets import Sheet
from motorpool.types import Kind, ReturnReason
from motorpool.wire import State


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Common to all events."""

    cause_id: str


class JobStarted(Event, frozen=True, kw_only=True):
    """A batch passed its checks.

    Line ``i`` has a body of about ``lengths[i]`` bytes, and an answer of at most ``limits[i]`` tokens over its choices.
    ``regions``: where alone it may run, empty for anywhere. ``min_trust``: the least tier of a vehicle that may run it.
    ``best_effort``: nothing is promised; it gets what others leave. ``memory_gb``: what a vehicle that says how much it
    has must have, 10^9 bytes.
    """

    job_no: int
    job_id: str
    account: str
    kind: Kind
    model: str
    price: Price
    expires_ms: int
    lengths: npt.NDArray[np.uint32]
    limits: npt.NDArray[np.uint32]
    regions: tuple[str, ...] = ()
    min_trust: int = 0
    memory_gb: int = 0
    best_effort: bool = False


class CancelAsked(Event, frozen=True, kw_only=True):
    """The customer cancels a job."""

    job_no: int


class VehicleReported(Event, frozen=True, kw_only=True):
    """A vehicle's state message."""

    vehicle_id: str
    state: State


class SheetArrived(Event, frozen=True, kw_only=True):
    """Reports of many vehicles, in the order of the sheet; ``relay`` sent them, and may speak for all of them.

    ``refused``: its numbers of vehicles for which it may not, and whose reports were taken out.
    """

    relay: str
    sheet: Sheet
    refused: list[int] = []


class FeedEnded(Event, frozen=True, kw_only=True):
    """A relay may not speak any more, or not for the same vehicles: its numbers mean nothing from now on."""

    relay: str


class VehicleRevoked(Event, frozen=True, kw_only=True):
    """A vehicle was struck from the books and gets no more work."""

    vehicle_id: str


class OwnerSpoke(Event, frozen=True, kw_only=True):
    """What the owner of a vehicle last said, as it stands in the books already.

    ``withdrawn``: the consent was taken back. ``paused_until_ms``: no work before, 0 without a pause.
    """

    vehicle_id: str
    withdrawn: bool
    paused_until_ms: int
    what: str


class VehicleConfigured(Event, frozen=True, kw_only=True):
    """What the operator has set for a vehicle: its site ("" for none), its tier of trust, whether it is a reserve.

    A reserve works only on what would be late without it.
    """

    vehicle_id: str
    site: str
    trust: int
    reserve: bool


class SiteConfigured(Event, frozen=True, kw_only=True):
    """What a site bears: power of the vehicles at work together, and how many may be at work; 0: no limit."""

    site: str
    limit_w: int
    limit_vehicles: int


class CustomerConfigured(Event, frozen=True, kw_only=True):
    """The share of a customer, relative to those of the others, where work of both waits."""

    account: str
    weight: float


class ResultsArrived(Event, frozen=True, kw_only=True):
    """Finished attempts, as columns of equal length."""

    vehicle_id: str
    lease_id: str
    job_id: str
    message_id: str
    lines: list[int]
    statuses: list[int]
    prompt_tokens: list[int]
    completion_tokens: list[int]
    cached_tokens: list[int]
    carried_tokens: list[int]
    energy_mwh: int
    energy_is_measured: bool = False


class WorkReturned(Event, frozen=True, kw_only=True):
    """Attempts that a vehicle does not hold any more, as columns; ``tokens`` is 0 where there is no checkpoint.

    ``sizes`` are the bytes of the checkpoints.
    """

    vehicle_id: str
    lease_id: str
    job_id: str
    reason: ReturnReason
    lines: list[int]
    tokens: list[int]
    sizes: list[int]
    started: list[bool]


class ProgressMade(Event, frozen=True, kw_only=True):
    """Checkpoints of attempts that go on; ``sizes`` are their bytes."""

    vehicle_id: str
    lease_id: str
    job_id: str
    lines: list[int]
    tokens: list[int]
    sizes: list[int]


class LiveEnded(Event, frozen=True, kw_only=True):
    """A live request ended and is to be paid: who generated how many tokens of it, and who read the prompt last.

    ``energy_uwh`` is what each vehicle drew for it.
    """

    request_id: str
    account: str
    price: Price
    prompt_tokens: int
    completion_tokens: int
    finisher: str
    shares: Shares
    energy_uwh: dict[str, int] = {}


class Ticked(Event, frozen=True, kw_only=True):
    """Time has passed."""


# -- changes of the books ----------------------------------------------------------------------------------------------


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Common to all commands."""


class SaveLease(Command, frozen=True, kw_only=True):
    """A lease was granted; ``base`` says how many tokens its checkpoints hold, for the lines that have one."""

    lease_id: str
    job_no: int
    vehicle_id: str
    incarnation: str
    granted_ms: int
    expires_ms: int
    lines: list[int]
    base: dict[int, int]


class DropLease(Command, frozen=True, kw_only=True):
    """A lease is over."""

    lease_id: str


class SaveHeld(Command, frozen=True, kw_only=True):
    """Lines were taken from a vehicle, or handed back by it; what it says of them later still counts."""

    job_no: int
    vehicle_id: str
    lines: list[int]


class SaveResults(Command, frozen=True, kw_only=True):
    """Results that count: ``picks`` are their places in the event, ``costs_micro`` what each costs.

    ``with_checkpoint`` are those of their lines whose checkpoints are of no more use. ``energy_uwh`` and ``co2_ug`` are
    each line's part.
    """

    job_no: int
    vehicle_id: str
    picks: list[int]
    costs_micro: list[int]
    carried_tokens: list[int]
    energy_uwh: list[int]
    co2_ug: list[int]
    energy_is_measured: bool = False
    with_checkpoint: list[int] = []


class SaveFailures(Command, frozen=True, kw_only=True):
    """Lines that are given up without an answer."""

    job_no: int
    lines: list[int]
    code: str
    message: str


class SaveCheckpoints(Command, frozen=True, kw_only=True):
    """Checkpoints that are longer than what is known: places in the event, and who generated what."""

    job_no: int
    picks: list[int]
    lines: list[int]
    tokens: list[int]
    shares: list[Shares]


class SaveJobCounts(Command, frozen=True, kw_only=True):
    """Totals of a job, to be added to its row."""

    job_no: int
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    carried_tokens: int = 0
    cost_micro: int = 0
    energy_uwh: int = 0
    measured_uwh: int = 0
    co2_ug: int = 0


class SaveVehicleCounts(Command, frozen=True, kw_only=True):
    """Totals of a vehicle, to be added to its row."""

    vehicle_id: str
    lines_done: int = 0
    tokens_generated: int = 0
    tokens_handed_on: int = 0
    tokens_taken_over: int = 0
    energy_uwh: int = 0
    co2_ug: int = 0


class SaveRegion(Command, frozen=True, kw_only=True):
    """A vehicle is in another region than it was."""

    vehicle_id: str
    region: str


class SaveWithdrawal(Command, frozen=True, kw_only=True):
    """The vehicle itself knows that its consent was withdrawn (``seen``), or has had a new one since."""

    vehicle_id: str
    seen: bool


class DropStory(Command, frozen=True, kw_only=True):
    """Forget what was noted of a vehicle: its owner has withdrawn the consent."""

    subject: str


class SaveJobStatus(Command, frozen=True, kw_only=True):
    """A job changes its status."""

    job_no: int
    status: str


class PostTransfers(Command, frozen=True, kw_only=True):
    """Money moves.

    ``rests`` are those that have changed, as ``core.ledger`` names them. ``request_id`` is the live request that is
    paid with this, if it is one: the books take each once.
    """

    transfers: list[Transfer]
    rests: dict[str, int] = {}
    request_id: str = ""


class Note(Command, frozen=True, kw_only=True):
    """One more entry in the story of a vehicle or job; holds no private content."""

    subject: str
    what: str


# -- acts, after the commit --------------------------------------------------------------------------------------------


class SendGrant(Command, frozen=True, kw_only=True):
    """Send a lease, with its bodies and checkpoints, to its vehicle (again)."""

    lease_id: str
    job_no: int
    vehicle_id: str
    incarnation: str
    model: str
    kind: Kind
    ttl_ms: int
    lines: list[int]
    with_checkpoint: list[int]
    max_offline_ms: int
    pay_input_micro: int
    pay_output_micro: int


class SendRevoke(Command, frozen=True, kw_only=True):
    """Ask a vehicle to give back a lease or some of its lines."""

    vehicle_id: str
    lease_id: str
    lines: list[int] | None = None
    keep_running: bool = False


class SendOwnerNews(Command, frozen=True, kw_only=True):
    """Tell a vehicle, as the books have it, what its owner has earned and has said by the cell."""

    vehicle_id: str


class SheetTaken(Command, frozen=True, kw_only=True):
    """Answer a relay: how many reports were applied, and the numbers of vehicles whose next one is wanted in full.

    ``live``: vehicles in the sheet that run live requests. ``whole``: reports that came in full.
    """

    relay: str
    feed: int
    number: int
    taken: int
    wanted: list[int]
    live: list[str]
    whole: list[tuple[str, State]]
    refused: list[int] = []


class AssembleFiles(Command, frozen=True, kw_only=True):
    """Every line of the job has ended: write its output and error files."""

    job_no: int


SchedulerEvent = (
    JobStarted
    | CancelAsked
    | VehicleReported
    | SheetArrived
    | FeedEnded
    | VehicleRevoked
    | OwnerSpoke
    | VehicleConfigured
    | SiteConfigured
    | CustomerConfigured
    | ResultsArrived
    | WorkReturned
    | ProgressMade
    | LiveEnded
    | Ticked
)
