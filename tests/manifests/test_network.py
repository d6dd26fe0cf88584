"""`--offline`: what is refused, with which sentence, and that it holds in every process.

The hook cannot be removed, so it is only installed in processes of its own; the refusals look at the environment alone.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from calibration.sources import load_samples
from manifests.errors import BadInputError
from manifests.network import check_reachable, is_offline
from tests.conftest import vlmconvert
from tests.network import fresh_environment, observed

OFFLINE = "VLMCONVERT_OFFLINE"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv(OFFLINE, "1")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, False), ("", False), ("0", False), ("false", False), ("1", True), ("true", True), ("yes please", True)],
)
def test_what_the_variable_says(value, expected, monkeypatch):
    monkeypatch.delenv(OFFLINE, raising=False)
    if value is not None:
        monkeypatch.setenv(OFFLINE, value)
    assert is_offline() == expected


PROGRAM = """
import socket, sys, threading, urllib.request
import vlmconvert
from manifests.network import NetworkForbiddenError
from passes.store import Store
from vlmconvert.conversion.helper import Helper

if sys.argv[1] == "call":
    vlmconvert.forbid_network()

def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return isinstance(error, NetworkForbiddenError) or isinstance(getattr(error, "reason", None), NetworkForbiddenError)
    return False

tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
other = "192.0.2.1"
for call, *arguments in (
    (tcp.connect, (other, 80)),
    (tcp.connect_ex, (other, 80)),
    (tcp.bind, ("0.0.0.0", 0)),
    (tcp.bind, ("", 0)),
    (socket.socket(socket.AF_INET6).connect, ("2001:db8::1", 80)),
    (udp.sendto, b"x", (other, 80)),
    (udp.sendmsg, [b"x"], [], 0, (other, 80)),
    (socket.getaddrinfo, "example.org", 80),
    (socket.gethostbyname, "example.org"),
    (socket.gethostbyaddr, other),
    (socket.getnameinfo, (other, 80), 0),
    (urllib.request.urlopen, "http://example.org/"),
):
    assert refused(call, *arguments), (call, arguments)

here, there = socket.socketpair()
here.sendall(b"x")
assert there.recv(1) == b"x"
place = socket.socket(socket.AF_UNIX)
place.bind("place")
place.listen()
socket.socket(socket.AF_UNIX).connect("place")
server = socket.create_server(("127.0.0.1", 0))
for host in ("127.0.0.1", "localhost"):
    socket.create_connection((host, server.getsockname()[1])).sendall(b"x")
    assert server.accept()[0].recv(1) == b"x"
assert socket.getaddrinfo(None, 80)

def attempt(_):
    urllib.request.urlopen("http://example.org/")

with Helper() as helper:
    assert refused(helper.run, attempt, Store)  # every task of a helper or a worker carries something of passes
"""


@pytest.mark.parametrize("how", ["call", "environment"])
def test_only_connections_that_stay_on_this_machine_are_made(tmp_path, how):
    """Without the observer of other tests, which would refuse the connections first."""
    environment = fresh_environment(tmp_path) | ({} if how == "call" else {OFFLINE: "1"})
    command = [sys.executable, "-c", PROGRAM, how]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


def test_hub_ids_are_taken_from_the_local_cache_alone(demo, tmp_path):
    """A checkpoint that an earlier run has fetched is found; one that it has not is refused."""
    model = tmp_path / "hub" / "models--org--here"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("0" * 40)).symlink_to(demo)
    program = """
import sys
from vlmconvert.commands.cli import main
from vlmconvert.conversion.open import find_checkpoint

_, checkpoint = find_checkpoint("org/here")
assert (checkpoint.model, checkpoint.revision) == ("org/here", "0" * 40), checkpoint
sys.argv = ["vlmconvert", "convert", "org/there"]
main()
"""
    run = observed(("-c", program), tmp_path, {OFFLINE: "1", "HF_HUB_CACHE": str(tmp_path / "hub")})
    assert run.code == 2, run.output
    assert "org/there is not in the local cache, and --offline forbids to fetch it: fetch it without" in run.output
    assert run.hosts == []


def test_the_option_holds_before_anything_else(tmp_path):
    run = observed(("-m", "vlmconvert", "--offline", "convert", "org/there"), tmp_path)
    assert run.code == 2, run.output
    assert run.output.startswith("vlmconvert: org/there is not in the local cache")
    assert run.hosts == []


@pytest.mark.usefixtures("offline")
def test_data_on_the_hub_is_refused():
    with pytest.raises(
        BadInputError, match="data source org/data is on the hub, and --offline forbids connections: give scenes"
    ):
        load_samples("org/data:train", 4)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "address", ["http://192.0.2.1:8000/v1", "https://example.org/v1", "dask://head:8786", "http:///v1"]
)
def test_addresses_of_other_hosts(address):
    with pytest.raises(
        BadInputError, match=f"--endpoint {address} is on another host, and --offline forbids connections"
    ):
        check_reachable("endpoint", address)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "address", ["http://localhost:8000/v1", "http://127.0.0.1/v1", "dask://[::1]:8786", "ray://127.1.2.3:1"]
)
def test_addresses_of_this_machine(address):
    check_reachable("endpoint", address)


@pytest.mark.usefixtures("offline")
def test_clusters_and_servers_elsewhere_are_refused(demo, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"")
    describe = ("describe", "--images", tmp_path / "images", "-o", tmp_path / "x.json")
    for command in (
        ("mllama", "--cluster", "dask://192.0.2.1:8786", "--store", tmp_path / "store"),
        (*describe, "--endpoint", "http://192.0.2.1:8000/v1"),
    ):
        result = vlmconvert(*command)
        assert result.exit_code == 2, result.output
        assert "is on another host, and --offline forbids connections: leave out one of the two" in result.output


def test_a_server_elsewhere_is_no_matter_otherwise(monkeypatch):
    monkeypatch.delenv(OFFLINE, raising=False)
    check_reachable("endpoint", "http://192.0.2.1:8000/v1")
