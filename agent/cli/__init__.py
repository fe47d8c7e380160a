"""The `overnight` command line: where errors become one line of text and an exit code.

Commands are imported when they are called, so that `overnight sql` starts without LangGraph or torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from overnight.store.errors import InputError, LeaseHeldError, OvernightError

_COMMANDS = {
    "init": "campaigns:init",
    "check": "campaigns:check",
    "run": "running:run",
    "pause": "running:pause",
    "status": "status:status",
    "enqueue": "running:enqueue",
    "sql": "asking:sql",
    "show": "asking:show",
    "import": "trajectory:import_command",
    "export": "trajectory:export_command",
    "distill": "learning:distill",
    "race": "contests:race",
    "promote": "contests:promote",
    "rollback": "contests:rollback",
    "report": "reporting:report",
    "serve": "reporting:serve",
    "mcp": "mcp:mcp",
    "db": "database:db",
    "doctor": "doctor:doctor",
}
"""Each command with the module and name of its function, in the order that `--help` shows."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order people meet them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(f"overnight.agent.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="overnight")
def overnight() -> None:
    """Unattended campaigns of short training experiments that get better at choosing themselves.

    A first run: `overnight run quickstart`, then `overnight sql "select iteration, knob, new_value, outcome, gain from
    iterations"`.
    """


def main() -> NoReturn:
    """Run the command line: 0 done, 1 a clear no, 2 wrong use or bad input, 3 a fault outside."""
    try:
        code = overnight.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except OvernightError as error:
        click.echo(f"overnight: {_one_line(str(error))}", err=True)
        code = 2 if isinstance(error, InputError | LeaseHeldError) else 3
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (`| head`); nothing more can be said
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(message: str) -> str:
    from overnight.trainer.output import clean

    return " ".join(clean(message).split())
