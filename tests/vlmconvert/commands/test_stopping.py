"""Signals end a command and all processes that it has started, also while a library computes."""

import signal
import subprocess
import sys

import psutil
import pytest

# Signals are as a terminal leaves them, though a shell may have started the tests in its background.
SCRIPT = """
import ctypes, signal, subprocess, sys, threading, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
from pathlib import Path
from manifests.leftovers import temporary_folder
from vlmconvert.commands.stopping import Stopped, stoppable

# Each way to be busy says so itself, when it is: an earlier signal would find other code.
def busy():
    print(child.pid, flush=True)

with temporary_folder(Path(sys.argv[1]), ".making-"), stoppable(lambda stopped: print("forced", stopped.exit_code, flush=True)):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], stdout=subprocess.DEVNULL)
    try:
        getattr(sys.modules[__name__], sys.argv[2])()
    except Stopped as stopped:
        print("raised", stopped.exit_code, flush=True)
        sys.exit(stopped.exit_code)
"""

# The main thread stays in the library, whatever signal arrives: it needs a mutex again that the other thread keeps. That one
# gets it only when the first waits, so it knows that the first is inside.
NATIVE = """
def native():
    library = ctypes.CDLL(None)
    mutex, condition = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)

    def inside():
        library.pthread_mutex_lock(mutex)
        busy()

    library.pthread_mutex_lock(mutex)
    threading.Thread(target=inside, daemon=True).start()
    library.pthread_cond_wait(condition, mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(number, tmp_path):
    script = SCRIPT.replace("\nwith ", "\ndef python():\n    busy()\n    time.sleep(300)\n\nwith ", 1)
    said, code, child = stopped(script, "python", number, tmp_path)
    assert (said, code) == (f"raised {128 + number}", 128 + number)
    assert ended(child)
    assert not list(tmp_path.iterdir())


def test_a_library_that_lets_no_exception_through_is_ended(tmp_path):
    script = SCRIPT.replace("\nwith ", f"{NATIVE}\nwith ", 1)
    said, code, child = stopped(script, "native", signal.SIGTERM, tmp_path)
    assert (said, code) == ("forced 143", 143)
    assert ended(child)
    assert not list(tmp_path.iterdir())


def test_a_native_module_that_is_being_imported_gets_no_exception(tmp_path):
    loading = "\nfrom importlib.machinery import ExtensionFileLoader\ndef load(self=ExtensionFileLoader('a', 'b')):\n    busy()\n    time.sleep(300)\n"
    script = SCRIPT.replace("\nwith ", f"{loading}\nwith ", 1)
    said, code, child = stopped(script, "load", signal.SIGTERM, tmp_path)
    assert (said, code) == ("forced 143", 143)
    assert ended(child)
    assert not list(tmp_path.iterdir())


def test_what_nohup_ignores_stays_ignored(tmp_path):
    ignored = "\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\ndef python():\n    busy()\n    time.sleep(2)\n\nwith "
    script = SCRIPT.replace("\nwith ", ignored, 1)
    said, code, child = stopped(script, "python", signal.SIGHUP, tmp_path)
    assert (said, code) == ("", 0)
    psutil.Process(child).kill()


def ended(child):
    """Whether a process has ended, even if nobody has asked how."""
    return not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def stopped(script, way, number, folder):
    """What the script says and returns after a signal, and the process id of its child."""
    command = [sys.executable, "-c", script, str(folder), way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.send_signal(number)
        try:
            code = process.wait(60)
        finally:
            process.kill()
        return process.stdout.readline().strip(), code, child
