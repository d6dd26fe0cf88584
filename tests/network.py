"""Programs whose attempts to reach other hosts are refused and counted, in each of their processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Runs at the start of every Python process that finds it on its path, before any other code of the program. It is written
# without vlmconvert's own hook, on which it has to tell.
_OBSERVER = """
import ipaddress, json, os, sys

LIBRARIES = {"datasets", "gradio", "huggingface_hub", "nncf", "openvino", "openvino_telemetry", "torch", "transformers"}
LOG = os.open(os.environ["OBSERVER_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(**entry):
    os.write(LOG, (json.dumps({"pid": os.getpid(), **entry}) + "\\n").encode())

def own(host):
    try:
        return host in {"localhost", b"localhost", None} or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def observe(event, arguments):
    if event == "import" and arguments[0] in LIBRARIES and arguments[0] not in sys.modules:  # None there stops an import
        note(library=arguments[0], environment=dict(os.environ))
    elif event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
        address = arguments[1]
        if isinstance(address, tuple) and not own(address[0]):
            note(host=str(address[0]))
            raise OSError("no network")
    elif event in {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"} and not own(arguments[0]):
        note(host=str(arguments[0]))
        raise OSError("no network")

sys.addaudithook(observe)
note(started=sys.argv)
"""


@dataclass(frozen=True)
class Observed:
    """What a program did.

    Attributes:
        code: its exit code.
        output: its standard output and error.
        notes: what its processes noted: their start, the import of a library, and the hosts that they tried to reach.
    """

    code: int
    output: str
    notes: list[dict[str, Any]]

    @property
    def hosts(self) -> list[str]:
        """The other hosts that its processes tried to reach."""
        return [note["host"] for note in self.notes if "host" in note]

    @property
    def processes(self) -> set[int]:
        """Its Python processes."""
        return {note["pid"] for note in self.notes if "started" in note}


def fresh_environment(home: Path) -> dict[str, str]:
    """The environment of a new user, in which nothing is set."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}


def observed(command: Sequence[str | Path], place: Path, environment: Mapping[str, str] | None = None) -> Observed:
    """Run `python COMMAND` as a new user would, whose home is empty, without a network.

    Args:
        command: arguments of Python.
        place: an empty folder: the home, and the working directory.
        environment: further variables of the environment.
    """
    (place / "observer").mkdir()
    (place / "observer" / "sitecustomize.py").write_text(_OBSERVER, encoding="utf-8")
    log = place / "observer" / "log.jsonl"
    variables = fresh_environment(place) | {
        "PYTHONPATH": os.pathsep.join(map(str, (place / "observer", ROOT))),
        "OBSERVER_LOG": str(log),
        **(environment or {}),
    }
    ended = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=place,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    notes = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return Observed(ended.returncode, ended.stdout, notes)
