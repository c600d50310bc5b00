"""``motorpool demo``: a batch of real documents on three parked vehicles, one of which drives off in the middle.

Decides: when the owner of the second vehicle leaves and comes back, what is told about it, and whether it went well.
Must not: stand in for any part; vehicles, control plane, message server, engines and API are the real ones.
Called by: ``cli.main``.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import openai
from openai.types import Batch
from rich.console import Console
from rich.live import Live

from motorpool.cli import batchrun, display, documents, output
from motorpool.cli.batch import exit_code, make_client
from motorpool.cli.dev import DevCluster, DevConfig
from motorpool.cli.modelfiles import load_catalogue
from motorpool.cli.models import ensure_model
from motorpool.cli.operator import AdminClient
from motorpool.errors import MotorpoolError, SetupError
from motorpool.server.admin.views import StatusView, StoryEntry, VehicleView

MODEL: Final = "smollm2-135m-instruct"
VEHICLES: Final = 3
LEAVER: Final = 2
LEAVES_AT: Final = 0.33  # share of the lines that are done when the owner of the second vehicle leaves
BACK_AT: Final = 0.66  # or then, if that is earlier
BACK_AFTER_S: Final = 10.0
SLOTS: Final = 3  # each slot reads the examples once: more of them begin later, fewer use the engine badly
REFRESH_S: Final = 0.4
PLAIN_EVERY_S: Final = 5.0
LIMIT_S: Final = 220.0
SVG_COLUMNS: Final = 112
FONT_FACE: Final = re.compile(r"@font-face\s*\{[^}]*\}\s*")
HANDED_BACK: Final = re.compile(r"(?P<lines>\d+) lines handed back .* with (?P<tokens>\d+) tokens")

CATEGORIES: Final = ("crash", "fire", "injury")
PROMPT: Final = "Summarise the recall in one short sentence and name the risk, as JSON."
# A model this small understands what is wanted from three answers better than from any explanation.
EXAMPLES: Final = (
    (
        "The tailgate may fall. A falling tailgate increases the risk of injury. Dealers will replace the struts, "
        "free of charge.",
        '{"summary": "The tailgate may fall, with a risk of injury.", "category": "injury"}',
    ),
    (
        "The heater fan may overheat. An overheated fan increases the risk of a fire. Dealers will replace the fan, "
        "free of charge.",
        '{"summary": "The heater fan may overheat, with a risk of fire.", "category": "fire"}',
    ),
    (
        "The bolts of the wheels may be too short. Losing a wheel increases the risk of a crash. Dealers will replace "
        "the bolts, free of charge.",
        '{"summary": "The bolts of the wheels may be too short, with a risk of a crash.", "category": "crash"}',
    ),
)
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "summary": {"type": "string", "maxLength": 170},
        "category": {"type": "string", "enum": list(CATEGORIES)},
    },
    "required": ["summary", "category"],
    "additionalProperties": False,
}
MAX_TOKENS: Final = 72


class DemoConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo does. ``null_rate`` is tokens per second of each slot, and only for the null engine."""

    output: Path
    null: bool = False
    null_rate: float = 40.0
    svg: Path | None = None
    limit_s: float = LIMIT_S
    data: Path | None = None


def recalls() -> list[documents.Document]:
    """The documents of the demo, which come with the package."""
    with resources.as_file(resources.files("motorpool.examples") / "recalls") as folder:
        return documents.read_documents([folder])


class Reporter:
    """Turns what the operator's view says into a log of what happened, and draws it."""

    def __init__(self, console: Console, title: str, total: int, started_s: float) -> None:
        self.console = console
        self.happenings: list[display.Happening] = []
        self.status: StatusView | None = None
        self.batch_id: str | None = None
        self.live: Live | None = None
        self._title = title
        self._total = total
        self._started_s = started_s
        self._estimate = batchrun.Estimate()
        self._left_s: float | None = None
        self._plain_at_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the batch was handed in."""
        return time.monotonic() - self._started_s

    def tell(self, text: str, style: str = "") -> None:
        """Add a line to the log of events; without a terminal it is printed at once."""
        self.happenings.append(display.Happening(at_s=self.elapsed_s, text=text, style=style))
        if self.live is None:
            self.console.print(f"{display.duration(self.elapsed_s):>5}  {text}", soft_wrap=True)

    def take(self, status: StatusView) -> None:
        """A new answer of the operator's interface: note what changed and draw it."""
        before = {vehicle.vehicle_id: vehicle for vehicle in self.status.vehicles} if self.status else {}
        self.status = status
        for vehicle in status.vehicles:
            earlier = before.get(vehicle.vehicle_id)
            if earlier is not None:
                for text, style in changes(earlier, vehicle):
                    self.tell(text, style)
        batch = display.batch_of(status, self.batch_id)
        if batch is not None:
            self._left_s = self._estimate.left_s(self.elapsed_s, batch.completed + batch.failed, batch.total)
        self.draw()

    def hand_backs(self, vehicle: VehicleView, story: list[StoryEntry], since_ms: int) -> bool:
        """Tell what a vehicle handed back after ``since_ms``, in one line; False if nothing has been noted yet."""
        found = [HANDED_BACK.match(entry.what) for entry in story if entry.at_ms >= since_ms]
        counts = [(int(match["lines"]), int(match["tokens"])) for match in found if match is not None]
        if not counts:
            return False
        lines, tokens = (sum(column) for column in zip(*counts, strict=True))
        self.tell(f"{vehicle.name} hands back {lines} lines and the {tokens} tokens that it had generated", "magenta")
        return True

    def frame(self) -> display.Frame:
        """What is to be seen now."""
        return display.Frame(
            title=self._title,
            elapsed_s=self.elapsed_s,
            status=self.status,
            batch_id=self.batch_id,
            total=self._total,
            left_s=self._left_s,
            happenings=tuple(self.happenings),
        )

    def draw(self) -> None:
        """Show the current picture: live in a terminal, else a line now and then."""
        if self.live is not None:
            self.live.update(display.picture(self.frame()), refresh=True)
        elif self.elapsed_s - self._plain_at_s >= PLAIN_EVERY_S:
            self._plain_at_s = self.elapsed_s
            self.console.print(display.plain_line(self.frame()), soft_wrap=True)

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """The live display, if there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, transient=False) as live:
            self.live = live
            try:
                yield
            finally:
                self.live = None

    def save_svg(self, path: Path) -> None:
        """Save the current picture as SVG."""
        console = Console(width=SVG_COLUMNS, record=True, file=io.StringIO(), force_terminal=True)
        console.print(display.picture(self.frame()))
        # The picture must not fetch a font from anywhere: what the reader has is good enough.
        drawn = FONT_FACE.sub("", console.export_svg(title="make demo", unique_id="demo"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(drawn, "utf-8")


def changes(before: VehicleView, after: VehicleView) -> Iterator[tuple[str, str]]:
    """What is worth telling about a vehicle between two views of it, with the style to tell it in."""
    name = after.name or after.vehicle_id
    if after.tokens_taken_over > before.tokens_taken_over:
        count = after.tokens_taken_over - before.tokens_taken_over
        yield f"{name} finished what another vehicle had begun: {count} tokens were not generated again", "magenta"
    if after.state != before.state and after.state in ("yielding", "denied", "offline"):
        why = f": {display.reasons(after.reasons)}" if after.reasons else ""
        yield f"{name} is {after.state}{why}", "yellow"
    elif after.state != before.state and before.state in ("yielding", "denied", "offline"):
        yield f"{name} is {after.state}: it has a permit", "green"


class Script:
    """What the owner of the second vehicle does, step by step; each step waits for what went before to be seen."""

    def __init__(self, cluster: DevCluster, admin: AdminClient, reporter: Reporter, svg: Path | None) -> None:
        self._cluster = cluster
        self._admin = admin
        self._reporter = reporter
        self._svg = svg
        self._vehicle_id = cluster.vehicle_id(LEAVER)
        self._left_at_s: float | None = None
        self._left_ms = 0
        self._handed_back = False
        self.finished = False

    async def step(self, done_share: float) -> None:
        """Look at the newest view and do what is due."""
        vehicle = self._vehicle()
        if vehicle is None:
            return
        if self._left_at_s is None:
            if done_share >= LEAVES_AT and vehicle.running > 0:
                await self._leave(vehicle)
            return
        if not self._handed_back:
            story = await asyncio.to_thread(self._admin.story, self._vehicle_id)
            self._handed_back = self._reporter.hand_backs(vehicle, story, self._left_ms)
        away_s = self._reporter.elapsed_s - self._left_at_s
        due = not self.finished and (away_s >= BACK_AFTER_S or done_share >= BACK_AT)
        self._take_picture(last=due)
        if due:
            await self._come_back(vehicle)

    def _take_picture(self, *, last: bool) -> None:
        """Save the picture once another vehicle has gone on with a line; until then, that of the car on the road."""
        if self._svg is None:
            return
        view = display.batch_of(self._reporter.status, self._reporter.batch_id)
        carried = view is not None and view.tokens_carried > 0
        if carried or last:
            self._reporter.save_svg(self._svg)
        if carried:
            self._svg = None

    def _vehicle(self) -> VehicleView | None:
        vehicles = self._reporter.status.vehicles if self._reporter.status else []
        return next((vehicle for vehicle in vehicles if vehicle.vehicle_id == self._vehicle_id), None)

    async def _leave(self, vehicle: VehicleView) -> None:
        self._left_at_s = self._reporter.elapsed_s
        self._left_ms = self._reporter.status.now_ms if self._reporter.status else 0
        name = vehicle.name
        self._reporter.tell(
            f"the owner of {name} opens the door to drive off; {vehicle.running} lines run in it", "bold"
        )
        await self._cluster.play(self._vehicle_id, "drive-off")

    async def _come_back(self, vehicle: VehicleView) -> None:
        self.finished = True
        self._reporter.tell(f"the owner of {vehicle.name} is back, plugs in and walks away", "bold")
        await self._cluster.play(self._vehicle_id, "come-back")
        await self._cluster.play(self._vehicle_id, "plug-in")


class Demo:
    """One run of the demo."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._number = 0

    def _step(self, text: str) -> None:
        self._number += 1
        self._console.print(f"[bold blue]{self._number}[/bold blue] {text}", soft_wrap=True)

    async def run(self) -> int:
        """Run it; return the exit code."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # end the processes in order
        found = recalls()
        model = "null" if self._config.null else MODEL
        self._step(f"{len(found)} vehicle recalls of the US road safety agency NHTSA are the documents (public domain)")
        if not self._config.null:
            self._step(f"The model {MODEL} must be here, with the right hash")
            await asyncio.to_thread(ensure_model, load_catalogue().get(MODEL), self._console)
        with contextlib.ExitStack() as stack:
            folder = self._config.data
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="motorpool-demo-")))
            dev = DevConfig(
                data=folder, vehicles=VEHICLES, model=model, port=0, slots=SLOTS, null_rate=self._config.null_rate
            )
            reports: list[str] = []
            cluster = DevCluster(dev, reports.append)
            try:
                began_s = time.monotonic()
                self._step(f"Starting a message server, the control plane and {VEHICLES} vehicles, each a process")
                await cluster.start()
                return await self._work(cluster, found, model, reports, began_s + self._config.limit_s)
            finally:
                await cluster.stop()

    async def _work(
        self, cluster: DevCluster, found: list[documents.Document], model: str, reports: list[str], until_s: float
    ) -> int:
        running = cluster.running
        target = self._config.output
        batchrun.state_path(target).unlink(missing_ok=True)
        task = documents.Task(model=model, prompt=PROMPT, max_tokens=MAX_TOKENS, schema=SCHEMA, examples=EXAMPLES)
        lines = documents.batch_lines(found, task)
        self._step(f"Handing in a batch of {len(found)} lines through the official openai client: {running.base_url}")
        started_s = time.monotonic()
        admin = AdminClient(running.admin_url, running.admin_key)
        with make_client(running.base_url, running.api_key) as client, admin:
            batch, _ = await asyncio.to_thread(
                batchrun.hand_in, client, lines, target, window="1h", documents=len(found)
            )
            title = f"{len(found)} recalls, {model}, {VEHICLES} parked vehicles"
            reporter = Reporter(self._console, title, len(found), started_s)
            reporter.batch_id = batch.id
            reporter.tell(f"batch {batch.id} is handed in")
            script = Script(cluster, admin, reporter, self._config.svg)
            job = Job(client, admin, reporter, script)
            with reporter.showing():
                batch = await job.watch(batch, reports, until_s)
            self._step(f"The batch is {batch.status}; downloading its results")
            summary, tally = await job.collect(batch, [document.name for document in found], target)
        batchrun.state_path(target).unlink(missing_ok=True)  # the server that knows this batch ends with the demo
        self._console.print(display.summary_table(summary))
        if not script.finished:
            self._console.print("The batch was done before the second vehicle had left and come back.")
        return exit_code(batch.status, tally)


class Job:
    """The batch of the demo, seen from both sides: the customer's client and the operator's interface."""

    def __init__(self, client: openai.OpenAI, admin: AdminClient, reporter: Reporter, script: Script) -> None:
        self._client = client
        self._admin = admin
        self._reporter = reporter
        self._script = script

    async def watch(self, batch: Batch, reports: list[str], until_s: float) -> Batch:
        """Show the batch until it has ended, with what the owner does in between; raise TooSlowError after ``until_s``.

        ``reports`` fills with lines about processes that died and came back.
        """
        reporter = self._reporter
        while batch.status not in batchrun.ENDED:
            await asyncio.sleep(REFRESH_S)
            try:
                reporter.take(await asyncio.to_thread(self._admin.status))
            except SetupError:
                reporter.tell("the control plane does not answer for a moment", "red")
            while reports:
                reporter.tell(reports.pop(0), "red")
            view = display.batch_of(reporter.status, batch.id)
            await self._script.step((view.completed + view.failed) / view.total if view and view.total else 0.0)
            with contextlib.suppress(openai.APIConnectionError, openai.InternalServerError):
                batch = await asyncio.to_thread(self._client.batches.retrieve, batch.id)
            if time.monotonic() > until_s and batch.status not in batchrun.ENDED:
                raise TooSlowError(reporter.frame())
        return batch

    async def collect(self, batch: Batch, names: list[str], target: Path) -> tuple[display.Summary, batchrun.Tally]:
        """Download the results, write them beside the names of their documents, and count."""
        seconds = self._reporter.elapsed_s
        raw = await asyncio.to_thread(lambda: list(batchrun.result_lines(self._client, batch)))
        results, tally = batchrun.join(names, raw, parse=True)
        batchrun.write_results(target, results)
        status = await asyncio.to_thread(self._admin.status)
        return summarise(status, batch.id, tally, seconds, target), tally


class TooSlowError(MotorpoolError):
    """The machine did not get through in time."""

    default_code = "too_slow"

    def __init__(self, frame: display.Frame) -> None:
        batch = display.batch_of(frame.status, frame.batch_id)
        done = batch.completed + batch.failed if batch else 0
        super().__init__(
            f"{done} of {frame.total} lines are done after {display.duration(frame.elapsed_s)}, and about "
            f"{display.duration(frame.left_s)} of work is left: this machine is too slow or too busy for the demo. "
            "Nothing is wrong with the lines; stop what else is running and try again"
        )


def summarise(
    status: StatusView, batch_id: str, tally: batchrun.Tally, seconds: float, target: Path
) -> display.Summary:
    """The numbers of the end, from the results that were downloaded and from the books."""
    batch = display.batch_of(status, batch_id)
    return display.Summary(
        handed_in=tally.handed_in,
        completed=tally.completed,
        failed=tally.failed,
        lost=tally.missing,
        duplicated=tally.doubled + tally.unknown,
        tokens_generated=batch.tokens_generated if batch else 0,
        tokens_carried=batch.tokens_carried if batch else 0,
        energy_mwh=sum(vehicle.energy_mwh for vehicle in status.vehicles),
        energy_is_measured=all(vehicle.energy_is_measured for vehicle in status.vehicles),
        cost_micro=batch.cost_micro if batch else 0,
        currency=status.currency,
        earnings_micro={vehicle.name or vehicle.vehicle_id: vehicle.earned_micro for vehicle in status.vehicles},
        seconds=seconds,
        output=str(target),
    )


@click.command()
@click.option(
    "-o", "--output", "target", type=click.Path(path_type=Path, dir_okay=False),
    default=Path("demo-output/results.jsonl"), show_default=True, help="Where the results go.",
)  # fmt: skip
@click.option("--null", is_flag=True, help="Use the null engine instead of the model: no download, invented words.")
@click.option("--null-rate", default=40.0, show_default=True, help="Tokens per second of each slot of a null engine.")
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Save the picture after the departure.")
@click.option(
    "--limit", default=LIMIT_S, show_default=True, help="Give up after this many seconds, and say what is left."
)
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Keep everything here, not in a fresh folder."
)
@click.pass_context
def demo(
    context: click.Context,
    *,
    target: Path,
    null: bool,
    null_rate: float,
    svg: Path | None,
    limit: float,
    data: Path | None,
) -> None:
    """Run a batch of real documents on three parked vehicles; the owner of one drives off in the middle.

    Everything is real: a message server, the control plane, three vehicles with an engine each, and the official openai
    client that hands in the batch. Only the three cars are simulated.

    \b
    Exit codes: 0 all lines are there, once; 3 some lines failed; 4 lines are missing; 5 lines came twice;
    6 the batch did not complete; 7 the machine was too slow; 1 anything else.

    \b
    Examples:
      motorpool demo
      motorpool demo --null --null-rate 100
    """
    config = DemoConfig(output=target, null=null, null_rate=null_rate, svg=svg, limit_s=limit, data=data)
    console = Console(highlight=False)
    try:
        code = asyncio.run(Demo(config, console).run())
    except TooSlowError as error:
        output.print_error(error.message)
        code = output.EXIT_TOO_SLOW
    context.exit(code)
