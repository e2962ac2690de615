"""What a request can do wrong, as one sentence the client shows.

A future that failed carries a category: ``user`` (change the request) or ``server`` (try less, or again).
Everything else that is raised in the engine is a bug: the server answers 500 and logs the traceback.
"""

from __future__ import annotations

from typing import ClassVar

from metaclaw_core.errors import MetaClawError


class EngineError(MetaClawError):
    """The request can't be served as it is."""

    status: ClassVar[int] = 400  # HTTP status where no future exists yet
    category: ClassVar[str] = "user"


class NotFoundError(EngineError):
    """There is no such model, session or checkpoint (or it has expired)."""

    status = 404


class OutOfMemoryError(EngineError):
    """The device has no memory for this call; weights and gradients are as they were before it."""

    status = 503
    category = "server"
