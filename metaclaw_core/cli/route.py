"""``metaclaw route``: which version of the own model serves, and a move of it by hand.

Design: a move is one transaction of the journal and the route file after it, so running proxies follow within a second:
turns that have begun end with their weights. It does not wait for a training step that is under way; `pin` keeps such a
step from moving the route, `rollback` does not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from metaclaw_core.cli.output import json_line, opened_store, table, when
from metaclaw_core.errors import StoreError
from metaclaw_core.settings import home, load_settings

if TYPE_CHECKING:
    from metaclaw_core.learn.journal import InForce
    from metaclaw_core.store.rollouts import Store

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


@click.group("route")
def command() -> None:
    """See which version of your own model answers, pin one, go back."""


@command.command("list")
@_AS_JSON
def list_(as_json: bool) -> None:
    """The versions, and the one in force."""
    from metaclaw_core.routes import read_route
    from metaclaw_core.view.training import training

    with opened_store() as store:
        found = training(store)
    published = read_route(home())
    if as_json:
        state = {"enabled": published.enabled, "reason": published.reason} if published is not None else None
        json_line({"route": found.routes[0] if found.routes else None, "published": state, "versions": found.versions, "moves": found.routes})
        return
    if found.routes:
        now = found.routes[0]
        click.echo(_sentence(now["working"], now["stable"], now["pinned"]) + f" since {when(now['at'])}: {now['reason']}")
    if published is not None and not published.enabled:
        click.echo(f"Requests go to their own LLM: {published.reason or 'the route is off'}")
    table(
        ("version", "status", "made", "step", "from", "expires", "why"),
        (_row(version) for version in found.versions),
        empty="There is no version yet: training begins in mode rl, see `metaclaw train status`.",
        wide=("why",),
    )


def _row(version: dict[str, Any]) -> tuple[str, ...]:
    step, parent = version["step"], version["parent"]
    return (
        str(version["id"]),
        version["status"],
        when(version["created_at"]),
        "-" if step is None else str(step),
        "-" if parent is None else str(parent),
        when(version["expires_at"]),
        version["reason"] or "",
    )


@command.command("pin")
@click.argument("version", type=click.IntRange(min=1))
@_AS_JSON
def pin(version: int, as_json: bool) -> None:
    """Let VERSION answer, and let training move the route no more.

    The control share of the sessions (rl.control_share) stays on the stable version. `metaclaw route unpin` ends it.
    """
    with opened_store(drain=False) as store:
        current = _in_force(store)
        _check_serves(store, version)
        _move(store, as_json, working=version, stable=current.stable, reason="pinned by hand", pinned=True)


@command.command("unpin")
@_AS_JSON
def unpin(as_json: bool) -> None:
    """Let training move the route again."""
    with opened_store(drain=False) as store:
        current = _in_force(store)
        _move(store, as_json, working=current.working, stable=current.stable, reason="unpinned by hand", pinned=False)


@command.command("rollback")
@_AS_JSON
def rollback(as_json: bool) -> None:
    """Go back to the stable version; where that one serves already, to the stable version before it.

    Training goes on from there.
    """
    with opened_store(drain=False) as store:
        current = _in_force(store)
        target = current.stable if current.working != current.stable else _stable_before(store, current.stable)
        _check_serves(store, target)
        _move(store, as_json, working=target, stable=target, reason=f"rolled back by hand from version {current.working}", pinned=False)


# --- what they share ------------------------------------------------------------------------------


def _in_force(store: Store) -> InForce:
    from metaclaw_core.learn.journal import in_force

    current = in_force(store)
    if current is None:
        raise StoreError("There is no route yet: training begins in mode rl, see `metaclaw train status`.")
    return current


def _check_serves(store: Store, number: int) -> None:
    """Raises StoreError for a version that nobody could be answered from."""
    from metaclaw_core.learn.journal import version

    found, model = version(store, number), load_settings().rl.model
    if found.base_model != model:
        raise StoreError(f"Version {number} is of {found.base_model}, but rl.model is {model or 'not set'}.")
    if found.sampler_path is None and found.state_path is not None:
        raise StoreError(f"Version {number} was never published, so nothing can be sampled from it; see `metaclaw route list`.")
    if found.expires_at is not None and found.expires_at <= time.time():
        raise StoreError(f"The weights of version {number} have expired at the server; see `metaclaw route list`.")


def _stable_before(store: Store, stable: int) -> int:
    from metaclaw_core.view.training import training

    before = next((route["stable"] for route in training(store).routes if route["stable"] != stable), None)
    if before is None:
        raise StoreError(f"There is no version before {stable} to go back to; see `metaclaw route list`.")
    return int(before)


def _move(store: Store, as_json: bool, *, working: int, stable: int, reason: str, pinned: bool) -> None:
    from dataclasses import asdict

    from metaclaw_core.learn.journal import move_route
    from metaclaw_core.learn.prices import load_prices
    from metaclaw_core.learn.publish import publish

    moved = move_route(store, working=working, stable=stable, reason=reason, pinned=pinned)
    published = publish(store, load_settings(), load_prices(home()), home())
    if as_json:
        json_line({**asdict(moved), "enabled": published is not None and published.enabled})
        return
    click.echo(_sentence(moved.working, moved.stable, moved.pinned) + ".")
    if published is not None and not published.enabled:
        click.echo(f"Requests still go to their own LLM: {published.reason or 'the route is off'}")


def _sentence(working: int, stable: int, pinned: bool) -> str:
    return f"Version {working} answers" + (f", version {stable} the control share" if stable != working else "") + (" (pinned)" if pinned else "")
