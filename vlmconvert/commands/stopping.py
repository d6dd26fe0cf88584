"""Ending at once when the command line is stopped: by Ctrl-C, by a closed terminal, or by whoever runs it (SIGTERM)."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ExtensionFileLoader
from types import FrameType

from manifests.leftovers import remove_own

__all__ = ["Stopped", "stoppable"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# Seconds in which the command may end by itself after a signal, before its process is ended.
_GRACE = 1.5


class Stopped(KeyboardInterrupt):
    """The command has been stopped by a signal.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells report it."""
        return 128 + self.number


@contextmanager
def stoppable(say: Callable[[Stopped], None]) -> Iterator[None]:
    """Raise `Stopped` in the `with` block if a signal arrives.

    The processes that this one has started are killed at once. If the block does not end within seconds, because a library
    computes and lets no exception through, temporary folders are removed and this process ends.

    Args:
        say: tells the user, if the block does not end by itself.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    # A signal that is ignored stays so: `nohup` does this.
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    told, tell = socket.socketpair()
    tell.setblocking(False)
    ended = threading.Event()
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        received.append(number)
        if not _in_native_import(frame):  # else `watch` ends the process
            raise Stopped(number)

    def watch() -> None:
        while data := told.recv(1):
            if data[0] in numbers:
                _end_children()
                if not ended.wait(_GRACE):
                    _end_children()
                    remove_own()
                    stopped = Stopped(data[0])
                    with suppress(Exception):
                        say(stopped)
                    os._exit(stopped.exit_code)

    before = {number: signal.signal(number, handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if received:  # the thread may not have come to it
            _end_children()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        tell.close()


def _in_native_import(frame: FrameType | None) -> bool:
    """Whether the code of a frame was called by a native module that is being imported, which an exception may abort."""
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def _end_children() -> None:
    """Kill all processes that this one has started, but for those that tidy up after the others and end by themselves."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if not any("resource_tracker" in part for part in child.cmdline()):
                child.kill()
