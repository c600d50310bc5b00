"""What a vehicle installs: the wheel's base requirements, and that a vehicle's commands do with nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from motorpool.agent.settings import Source, parse_settings
from motorpool.cli import extras
from motorpool.cli.main import COMMANDS, cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "packaging"
SERVICE = PACKAGING / "systemd" / "motorpool-agent.service"
VEHICLE = {"click", "cryptography", "httpx", "msgspec", "nats-py", "rainflow", "segno", "uvloop"}
# Runs with the packages of VEHICLE and what those need: every other one that is installed cannot be imported.
BARE = """
import importlib.abc, json, sys

hidden = set(json.loads(sys.argv[1]))

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Hidden())
"""


def closure(names: set[str]) -> set[str]:
    """The distributions that are needed for these, themselves included."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        needed = [Requirement(line) for line in requires]
        asked = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
        waiting |= {canonicalize_name(need.name) for need in asked} - found
    return found


def hidden_packages() -> list[str]:
    """The top-level names that a vehicle with nothing but the base installation does not have."""
    there = closure(VEHICLE) | {"motorpool"}
    return sorted(
        top
        for top, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & there
    )


def bare(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python that has what a vehicle has."""
    command = [sys.executable, "-c", BARE + program, json.dumps(hidden_packages()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def motorpool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same for the command line."""
    return bare("from motorpool.cli.main import run; sys.exit(run(sys.argv[2:]))", *arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t", "wheel"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = BytesParser().parsebytes(wheel.read(name)).get_all("Requires-Dist")
    assert lines is not None
    return [Requirement(line) for line in lines]


def test_the_wheel_asks_for_what_a_vehicle_needs_and_for_nothing_else(wheel: zipfile.ZipFile) -> None:
    base = [need for need in requirements(wheel) if "extra" not in str(need.marker or "")]
    assert {need.name for need in base} == VEHICLE
    server = {"starlette", "uvicorn", "openai", "rich", "numpy", "python-multipart", "httptools", "aiohttp", "pydantic"}
    assert not closure(VEHICLE) & server


def test_all_is_every_extra_but_the_one_for_development(wheel: zipfile.ZipFile) -> None:
    extra = re.compile(r'extra == [\'"]([a-z]+)[\'"]')
    asked: dict[str, set[str]] = {}
    for need in requirements(wheel):
        for name in extra.findall(str(need.marker or "")):
            asked.setdefault(name, set()).add(need.name)
    rest = set().union(*(names for name, names in asked.items() if name not in {"all", "dev"}))
    assert asked["all"] == rest
    assert asked["vehicle"] == asked["llama"] | asked["page"] | asked["vss"] | {"rich"}


def test_the_wheel_holds_all_that_the_program_reads(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    package = ROOT / "src" / "motorpool"
    wanted = {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= names
    assert all(name.startswith(("motorpool/", "motorpool-")) for name in names)
    shared = {name.partition(".data/data/share/motorpool/")[2] for name in names}
    assert {str(path.relative_to(PACKAGING)) for path in PACKAGING.rglob("*") if path.is_file()} <= shared


@pytest.mark.parametrize(
    "arguments", [["agent"], ["owner"], ["consent"], ["car"], ["--version"]], ids=lambda words: words[0].lstrip("-")
)
def test_a_vehicles_commands_do_with_a_vehicles_packages(arguments: list[str]) -> None:
    done = motorpool(*arguments, *(["--help"] if not arguments[0].startswith("-") else []))
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout


def test_the_agent_is_loaded_with_a_vehicles_packages() -> None:
    done = bare("import motorpool.agent.main, motorpool.agent.enrolment, motorpool.agent.runtime.host")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [(["serve", "--data", "x"], "server"), (["models", "list"], "client"), (["keys"], "client")],
    ids=["serve", "models", "keys"],
)
def test_a_command_that_lacks_a_package_says_what_to_install(arguments: list[str], extra: str) -> None:
    done = motorpool(*arguments)
    assert done.returncode == 1
    assert done.stderr == f"motorpool: error: this command needs: pip install 'motorpool[{extra}]'\n"


def test_the_list_of_commands_shows_what_each_one_lacks() -> None:
    done = motorpool("--help")
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "needs: pip install 'motorpool[server]'" in " ".join(done.stdout.split())


def test_what_belongs_to_no_extra_is_not_explained_away() -> None:
    assert extras.missing(ModuleNotFoundError("No module named 'motorpool.nothing'", name="motorpool.nothing")) is None
    assert extras.missing(ModuleNotFoundError("No module named 'click'", name="click")) is None
    assert extras.missing(ImportError("cannot import name 'Console' from 'rich'", name="rich")) is None


def test_every_package_of_an_extra_is_known_by_the_name_that_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = project["optional-dependencies"]
    groups.pop("embedded")  # a program, which is looked for where it is started
    parts = {name: lines for name, lines in groups.items() if name not in {"all", "dev", "vehicle"}}
    wanted = {canonicalize_name(Requirement(line).name) for lines in parts.values() for line in lines}
    owners = packages_distributions()
    known = {canonicalize_name(owner) for top in extras.EXTRAS for owner in owners[top]}
    assert wanted <= known
    for top, extra in extras.EXTRAS.items():
        names = {canonicalize_name(Requirement(line).name) for line in groups[extra]}
        assert {canonicalize_name(owner) for owner in owners[top]} & names, (top, extra)


def test_with_all_packages_every_command_is_itself() -> None:

    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        assert "pip install" not in (command.short_help or "")


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Sections of a unit, each directive with all of its values."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals, line
            section.setdefault(name, []).append(value)
    return found


def test_the_service_can_do_nothing_to_the_car_and_ends_whole() -> None:
    service = unit(SERVICE)["Service"]
    single = {name: values[0] for name, values in service.items() if len(values) == 1}
    wanted = {
        "User": "motorpool",
        "Type": "notify",
        "Restart": "always",
        "KillMode": "control-group",
        "TimeoutStopSec": "5",
        "WatchdogSignal": "SIGKILL",
        "Delegate": "cpu memory pids",
        "Slice": "motorpool.slice",
        "MemorySwapMax": "0",
        "LimitCORE": "0",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateDevices": "yes",
        "StateDirectory": "motorpool",
        "RuntimeDirectory": "motorpool",
    }
    assert wanted.items() <= single.items()
    assert "AF_CAN" not in single["RestrictAddressFamilies"]
    assert "ProtectControlGroups" not in service  # the engine gets a group of its own below the service's
    assert service["SystemCallFilter"] == ["@system-service", "~@privileged"]
    conditions = unit(SERVICE)["Unit"]["ConditionPathExists"]
    assert conditions == ["/etc/motorpool/agent.toml", "/var/lib/motorpool/credentials.json"]
    assert single["ExecStart"].endswith(f"agent --config {conditions[0]}")
    assert unit(PACKAGING / "systemd" / "motorpool.slice")["Slice"] == {"CPUWeight": ["idle"], "IOWeight": ["1"]}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here to ask")
def test_systemd_takes_the_service_for_a_safe_one(tmp_path: Path) -> None:
    text = SERVICE.read_text("utf-8").replace("/opt/motorpool/bin/motorpool", sys.executable)
    here = tmp_path / SERVICE.name
    here.write_text(text, "utf-8")
    slice_ = tmp_path / "motorpool.slice"
    slice_.write_bytes((PACKAGING / "systemd" / slice_.name).read_bytes())
    verify = ["systemd-analyze", "verify", "--man=no", str(here), str(slice_)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(here)]
    done = subprocess.run(security, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-400:]


def test_the_users_and_folders_are_those_of_the_service() -> None:
    lines = {
        line
        for path in (*PACKAGING.glob("sysusers.d/*"), *PACKAGING.glob("tmpfiles.d/*"))
        for line in path.read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    }
    assert any(line.startswith("u motorpool - ") for line in lines)
    assert {line.split()[1] for line in lines if line.startswith("d ")} == {
        "/etc/motorpool",
        "/var/lib/motorpool",
        "/var/lib/motorpool/models",
    }


def test_the_example_of_a_configuration_is_one_and_the_guide_names_every_file() -> None:
    settings = parse_settings((PACKAGING / "etc" / "agent.toml").read_bytes(), "agent.toml")
    assert settings.agent.dir == "/var/lib/motorpool"
    assert settings.signals.source is Source.KUKSA
    guide = (ROOT / "docs" / "install-vehicle.md").read_text("utf-8")
    for path in PACKAGING.rglob("*"):
        if path.is_file():
            assert str(path.relative_to(PACKAGING)) in guide
