"""``metaclaw worker``: the worker by hand, where the proxy can't start it."""

from __future__ import annotations

import click


@click.command("worker")
def command() -> None:
    """Run the background jobs in the foreground until interrupted: take in recorded exchanges, build the skill index.

    A running proxy starts one by itself; this is for a proxy that can't.
    """
    import asyncio
    import logging

    from metaclaw_core.worker import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(follow_stdin=False))
