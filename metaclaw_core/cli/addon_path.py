"""``metaclaw addon-path``: the script for ``mitmdump -s``."""

from __future__ import annotations

from pathlib import Path

import click

from metaclaw_core.errors import MetaClawError

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "_bundled" / "metaclaw.py", _PACKAGE.parent / "addons" / "metaclaw.py")  # a wheel, a checkout


@click.command("addon-path")
def command() -> None:
    """Print where the addon is: mitmdump -s "$(metaclaw addon-path)"."""
    for path in _PLACES:
        if path.is_file():
            click.echo(path)
            return
    raise MetaClawError(f"The addon script is in none of {', '.join(map(str, _PLACES))}: install metaclaw again.")
