"""``metaclaw policy``: the policy server by hand, where the proxy can't start it, or to try a model out."""

from __future__ import annotations

import json

import click


@click.command("policy")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: any free port.")
@click.option("--json", "as_json", is_flag=True, help="The line that says where it listens, as JSON.")
def command(port: int, as_json: bool) -> None:
    """Answer requests of any LLM dialect from the model being trained, on 127.0.0.1, until interrupted.

    A running proxy in rl mode starts one by itself. Requests need the token that is printed, as a bearer token.
    """
    import asyncio
    import logging
    import secrets

    from metaclaw_core.policy.__main__ import quiet_sdk, serve

    quiet_sdk()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    token = secrets.token_urlsafe(32)

    def ready(url: str) -> None:
        if as_json:
            click.echo(json.dumps({"url": url, "token": token}))
        else:
            click.echo(f"metaclaw policy listens on {url}\n  authorization: Bearer {token}")

    asyncio.run(serve(token, port=port, ready=ready))
