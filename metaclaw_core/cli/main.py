"""The ``metaclaw`` command: a table of names, each command in its own module and imported when run.

Design: ``metaclaw --help`` answers from this table alone, so it stays fast however heavy a command's
imports are. A `MetaClawError` is printed as one sentence with exit status 1; anything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

import click

from metaclaw_core import __version__
from metaclaw_core.errors import MetaClawError

_COMMANDS = {
    "setup": ("setup:command", "Write the configuration, by questions or by flags."),
    "start": ("start:command", "Run the proxy: skills into prompts, exchanges into the store."),
    "stop": ("stop:stop", "Let open answers end, then end the proxy."),
    "restart": ("stop:restart", "Stop the proxy and start it again in the background."),
    "status": ("status:status", "What the running proxies do."),
    "top": ("top:command", "Watch in the terminal what happens."),
    "open": ("open_:command", "Show sessions, turns and skills on a page of your browser."),
    "bypass": ("status:bypass", "Let requests pass unchanged for a while."),
    "config": ("config:command", "Show and change settings."),
    "run": ("run:command", "Run a command with the proxy and its CA in its environment."),
    "env": ("env:command", "Print that environment for a shell."),
    "wire": ("wire:command", "Give an agent's own service the proxy, and take it away."),
    "service": ("service:command", "Have the system keep the proxy running."),
    "doctor": ("doctor:command", "Look for what is wrong, with a remedy for each."),
    "addon-path": ("addon_path:command", "Where the script for `mitmdump -s` is."),
    "skills": ("skills:command", "Look at, search, add, check and take back skills."),
    "turns": ("turns:command", "List recorded exchanges."),
    "sessions": ("sessions:command", "List recorded sessions."),
    "import": ("import_:command", "Record captured flows (mitmproxy files or HAR)."),
    "judge": ("judge:command", "Examine the judge that scores turns."),
    "store": ("store:command", "Check the store."),
    "evolve": ("evolve:command", "Write skills from what was said, now."),
    "engine": ("engine:command", "Train and sample on this machine: the Tinker protocol."),
    "train": ("train:command", "See what training has done, make a step now."),
    "route": ("route:command", "See which version of your own model answers, pin one, go back."),
    "rollout": ("rollout:command", "Give tasks from a folder to an agent, to learn from."),
    "policy": ("policy:command", "Answer from the model being trained, by hand."),
    "worker": ("worker:command", "Run the background jobs by hand."),
    "purge": ("purge:command", "Forget recorded sessions, everywhere."),
    "uninstall": ("uninstall:command", "Undo wirings and service, and remove what MetaClaw wrote."),
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"metaclaw_core.cli.{module}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS:
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {close[0]}?" if close else " See metaclaw --help."
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="metaclaw")
def group() -> None:
    """Just talk to your agent: it learns. A mitmproxy addon for agents' LLM traffic.

    Files live in ~/.metaclaw; METACLAW_HOME moves them.
    """


def main() -> None:
    try:
        group()
    except MetaClawError as e:
        click.echo(f"metaclaw: {e}", err=True)
        sys.exit(1)
    except OSError as e:  # not EPIPE (`metaclaw turns | head`): click ends quietly on that one
        if e.filename is None and e.errno in _FULL:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered would fail once more at the exit
            click.echo(f"metaclaw: the output can't be written ({e.strerror}): make room, or send it elsewhere.", err=True)
            sys.exit(1)
        if not _in_our_home(e):
            raise
        click.echo(
            f"metaclaw: {e.filename} can't be used ({e.strerror}): make it yours, or name another folder with METACLAW_HOME.",
            err=True,
        )
        sys.exit(1)


def _in_our_home(error: OSError) -> bool:
    """Whether a file of ours is in the way (read-only, another user's, no room): the user can mend that."""
    from metaclaw_core.settings import home

    return isinstance(error.filename, str | os.PathLike) and str(home()) in (name := os.fspath(error.filename), *map(str, Path(name).parents))


if __name__ == "__main__":
    main()
