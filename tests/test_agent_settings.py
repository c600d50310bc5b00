"""The agent's configuration file: what it may say, what it says wrong, and that every field is an option."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motorpool.agent.settings import AgentSettings, load_settings, parse_settings
from motorpool.cli.agent import agent
from motorpool.errors import SetupError

WHOLE = """
[agent]
dir = "/var/lib/motorpool"
model = "smollm2-135m-instruct"
small_model = "null"
slots = 8
threads = 3
url = "http://127.0.0.1:11434/v1"
remote_model = "llama3.2"
api_key_env = "KEY"
region = "DE"
unmetered = true

[signals]
source = "kuksa"
address = "127.0.0.1:55555"
token_file = "/etc/motorpool/kuksa.token"
ca_file = "/etc/motorpool/ca.pem"

[limits]
watts = 80
floor_pct = 35
memory_mb = 2048
spool_mb = 0

[power]
idle_w = 12
most_w = 55.5
awake_w = 0
calibrate = true

[tariff]
prices_kwh = [0.29]

[page]
host = "192.168.4.1"
port = 8711
"""


def parsed(text: str) -> AgentSettings:
    return parse_settings(text.encode(), "agent.toml")


def refusal(text: str) -> str:
    with pytest.raises(SetupError) as raised:
        parsed(text)
    return raised.value.message.removeprefix("the settings agent.toml cannot be used: ")


def test_every_field_is_an_option_of_the_command_line() -> None:
    options = parsed(WHOLE).options()
    fields = 10 + 4 + 4 + 4 + 1 + 2
    joined = 3  # source goes into address, idle_w and most_w into one, host and port into one
    assert len(options) == fields - joined
    context = agent.make_context("agent", [], default_map=options)
    said = context.params
    assert said["folder"] == Path("/var/lib/motorpool")
    assert (said["model"], said["small_model"], said["slots"], said["threads"]) == (
        "smollm2-135m-instruct", "null", 8, 3
    )  # fmt: skip
    assert (said["url"], said["remote_model"], said["api_key_env"]) == ("http://127.0.0.1:11434/v1", "llama3.2", "KEY")
    assert (said["region"], said["unmetered"], said["simulated"]) == ("DE", True, False)
    assert (said["kuksa"], str(said["kuksa_token"])) == ("127.0.0.1:55555", "/etc/motorpool/kuksa.token")
    assert str(said["kuksa_ca"]) == "/etc/motorpool/ca.pem"
    assert (said["watts"], said["floor"], said["memory"], said["spool"]) == (80, 35.0, 2048, 0)
    assert (said["node_watts"], said["awake_watts"], said["calibrate"]) == ((12.0, 55.5), 0.0, True)
    assert said["tariff"].micro_kwh == (290_000,)
    assert said["page"] == ("192.168.4.1", 8711)


def test_what_the_command_line_says_goes_first() -> None:
    context = agent.make_context("agent", ["--watts", "40", "--dir", "here"], default_map=parsed(WHOLE).options())
    assert (context.params["watts"], context.params["folder"]) == (40, Path("here"))


def test_an_empty_file_says_nothing_and_a_car_of_its_own_makes_says_so() -> None:
    assert parsed("").options() == {}
    assert parsed('[signals]\nsource = "simulated"').options() == {"simulated": True}
    assert parsed("[tariff]\nprices_kwh = [" + ", ".join(["0.1"] * 24) + "]").options()["tariff"].count(",") == 23


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[agent]\nthreads = 0", "agent.threads: Expected `int` >= 1"),
        ('[agent]\nthreads = "two"', "agent.threads: Expected `int | null`, got `str`"),
        ("[agent]\nthread = 2", "agent: Object contains unknown field `thread`"),
        ("[limit]\nwatts = 2", "Object contains unknown field `limit`"),
        ("[limits]\nfloor_pct = 101", "limits.floor_pct: Expected `float` <= 100.0"),
        ("[limits]\nfloor_pct = nan", "limits.floor_pct: Expected `float` >= 0.0"),
        ('[agent]\nurl = "ftp://host"', "agent.url: Expected `str` matching regex '^https?://'"),
        ('[signals]\nsource = "can"', "signals.source: Invalid enum value 'can'"),
        ('[signals]\nsource = "kuksa"', "signals.address: a KUKSA databroker needs its address"),
        ('[signals]\ntoken_file = "x"', 'signals.token_file: this is for source = "kuksa" alone'),
        ("[power]\nidle_w = 3", "power.most_w: with idle_w, say"),
        ("[power]\nidle_w = 3\nmost_w = 3", "power.most_w: this has to be more than idle_w"),
        ("[tariff]\nprices_kwh = [0.1, 0.2]", "tariff.prices_kwh: give one price, or 24"),
        ("[tariff]\nprices_kwh = [inf]", "tariff.prices_kwh: give one price, or 24"),
        ("[agent", "is no TOML:"),
        ("# " + "x" * 70_000, "is longer than 65536 bytes"),
    ],
    ids=lambda value: value[:24].replace("\n", " "),
)
def test_what_is_wrong_is_said_with_its_field(text: str, said: str) -> None:
    assert refusal(text).startswith(said)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"cannot read the settings .*agent\.toml: No such file"):
        load_settings(tmp_path / "agent.toml")
    (tmp_path / "agent.toml").write_text(WHOLE, "utf-8")
    assert load_settings(tmp_path / "agent.toml") == parsed(WHOLE)


@given(st.binary(max_size=400) | st.sampled_from(WHOLE.splitlines()).map(str.encode))
def test_bytes_of_any_kind_are_settings_or_a_readable_error(data: bytes) -> None:
    try:
        said = set(parse_settings(data, "agent.toml").options())
    except SetupError as error:
        words = error.message
    else:
        assert said <= {parameter.name for parameter in agent.params}
        return
    assert words.startswith("the settings agent.toml cannot be used: ")
