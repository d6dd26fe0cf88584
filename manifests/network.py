"""Working offline: no connection to another host is made, in this process and in those that it starts.

An audit hook of Python refuses what goes to other hosts. It sees every connection that is made through Python's own sockets,
whichever library makes it. A library's native code is not bound by it; the variables of `_VARIABLES` tell such libraries, too.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

from manifests.errors import BadInputError

__all__ = ["NetworkForbiddenError", "check_reachable", "follow_environment", "forbid_network", "is_offline"]

_OFFLINE = "VLMCONVERT_OFFLINE"
# huggingface_hub, datasets, transformers, and the client in native code that huggingface_hub downloads with.
_VARIABLES = (_OFFLINE, "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_XET")
_FALSE = {"", "0", "false", "no", "off"}

# Audit events whose arguments are a socket and an address, and those whose first argument is a host.
_ADDRESSED = {"socket.bind", "socket.connect", "socket.sendmsg", "socket.sendto"}
_NAMED = {"socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname"}

_hooked = False


class NetworkForbiddenError(BadInputError, OSError):
    """A connection to another host was refused; libraries take it for a network that does not work."""


def is_offline() -> bool:
    """Whether connections to other hosts are forbidden."""
    return os.environ.get(_OFFLINE, "").lower() not in _FALSE


def follow_environment() -> None:
    """Forbid connections if the environment says so, as it does in the processes of a command that runs offline."""
    if is_offline():
        forbid_network()


def forbid_network() -> None:
    """Forbid connections to other hosts, for good: in this process, and in all that it starts from now on."""
    global _hooked
    for name in _VARIABLES:
        os.environ[name] = "1"
    if not _hooked:
        _hooked = True
        sys.addaudithook(_refuse_other_hosts)


def check_reachable(option: str, address: str) -> None:
    """Refuse the address of another host if connections are forbidden.

    Args:
        option: name of the option that gives the address.
        address: a URL.

    Raises:
        BadInputError: if the address may not be used.
    """
    if is_offline() and not _is_own(urlsplit(address).hostname):
        raise BadInputError(
            f"--{option} {address} is on another host, and --offline forbids connections: leave out one of the two"
        )


def _refuse_other_hosts(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _ADDRESSED:
        connection, address = arguments[:2]
        if address is None or connection.family == socket.AF_UNIX:  # sendmsg has no address on a connection that exists
            return
        inet = connection.family in {socket.AF_INET, socket.AF_INET6}
        host, allowed = (address[0], _is_own(address[0])) if inet else (address, False)
    elif event in _NAMED:
        host, allowed = arguments[0], arguments[0] is None or _is_own(arguments[0])
    elif event == "socket.getnameinfo":
        host, allowed = arguments[0][0], _is_own(arguments[0][0])
    else:
        return
    if not allowed:
        raise NetworkForbiddenError(
            f"a connection to {host or 'all interfaces'} is needed, and --offline forbids it: leave out --offline, or "
            f"unset {_OFFLINE}"
        )


def _is_own(host: str | bytes | None) -> bool:
    """Whether a host is this machine, by a name or an address that never leaves it."""
    name = host.decode(errors="replace") if isinstance(host, bytes) else host or ""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
