"""The command line. Heavy libraries are imported by the commands, not here, so that --help answers at once."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from contextlib import suppress
from functools import partial
from typing import Any

import click

from manifests.errors import VlmConvertError, is_disk_full
from manifests.network import forbid_network
from vlmconvert.commands import COMMANDS
from vlmconvert.commands.stopping import Stopped, stoppable
from vlmconvert.commands.streams import open_streams, silence
from vlmconvert.families import FAMILIES
from vlmconvert.version import __version__

__all__ = ["main"]

# What a shell reports for a program that SIGPIPE has ended.
_BROKEN_PIPE = 141


class _Group(click.Group):
    """Finds the commands by name, and reports every failure as one sentence with its exit code."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(dict.fromkeys(("convert", *FAMILIES.names, *COMMANDS)))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            if name != "convert" and name not in FAMILIES:
                return None
            from vlmconvert.commands.convert import conversion_command

            return conversion_command(name, None if name == "convert" else name)
        module, _, attribute = COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, context: click.Context) -> Any:
        open_streams()
        try:
            with stoppable(partial(_say_stopped, context)):
                return super().invoke(context)
        except Stopped as stopped:
            _say_stopped(context, stopped)
            sys.exit(stopped.exit_code)
        except VlmConvertError as error:
            if context.params.get("debug"):
                traceback.print_exc()
            click.echo(f"vlmconvert: {error}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:  # nobody reads the output any more
            silence(sys.stdout)
            sys.exit(_BROKEN_PIPE)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            if context.params.get("debug"):
                traceback.print_exc()
            if is_disk_full(error):
                click.echo("vlmconvert: a disk is full: free some space and run the same command again", err=True)
                sys.exit(3)
            reason = " ".join(str(error).split()) or type(error).__name__
            click.echo(
                f"vlmconvert: {type(error).__name__}: {reason}; run again as vlmconvert --debug ... for details",
                err=True,
            )
            sys.exit(3)


def _say_stopped(context: click.Context, stopped: Stopped) -> None:
    goes_on = context.invoked_subcommand in ("convert", "build", *FAMILIES.names)
    mend = ": run the same command again, which goes on from here" if goes_on else ""
    with suppress(OSError):  # the terminal may be closed
        click.echo(f"vlmconvert: stopped by {signal.Signals(stopped.number).name}{mend}", err=True)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Convert a Hugging Face vision-language checkpoint into compressed, checked artifacts.

    \b
    Examples:
      vlmconvert mllama --llm int4-awq --vision int8-ptq
      vlmconvert mllama meta-llama/Llama-3.2-11B-Vision-Instruct -o llama-int4
      vlmconvert run llama-int4 --image photo.jpg --prompt "What is in the image?"

    Exit codes: 0 done, 1 a check failed, 2 bad input, 3 conversion failed, 130 and 143 stopped by Ctrl-C and SIGTERM.
    """,
)
@click.version_option(__version__, prog_name="vlmconvert")
@click.option("--debug", is_flag=True, help="Show a traceback if something fails.")
@click.option("--offline", is_flag=True, help="Forbid connections to other hosts.  [env var: VLMCONVERT_OFFLINE]")
def main(debug: bool, offline: bool) -> None:
    """See the help."""
    if offline:
        forbid_network()
