"""``metaclaw open``: the page that shows what is recorded, served by this very process until it is interrupted."""

from __future__ import annotations

import signal
import sys
import threading

import click

from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import home, load_settings, skills_settings


@click.command("open")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Serve here; default: any free port.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def command(port: int, no_browser: bool) -> None:
    """Show sessions, turns, skills and the worker on a page of your own browser, until Ctrl-C.

    The page is for reading, on 127.0.0.1 only, and the printed address works once.
    """
    import webbrowser

    from metaclaw_core.cli.output import opened_store
    from metaclaw_core.skills.library import open_library
    from metaclaw_core.view.server import Server
    from metaclaw_core.view.site import Site

    settings = load_settings()
    with opened_store() as store:
        site = Site(store, open_library(skills_settings(settings)), home() / "spool")
        try:
            server = Server(site, port)
        except OSError as e:
            raise MetaClawError(f"Port {port} of 127.0.0.1 can't be used ({e.strerror}): leave --port out for a free one.") from e
        with server:
            try:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
                click.echo(f"{server.url}\nThe address works once. Ctrl-C ends the page.")
                sys.stdout.flush()
                if not no_browser:
                    # Beside the server: a browser of the terminal returns only when it is closed.
                    threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
                server.serve_forever()
            except KeyboardInterrupt:
                click.echo()
