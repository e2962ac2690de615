"""A task for the real OpenClaw: one isolated ``openclaw agent exec`` in the task's folder.

Design: the command is the user's own OpenClaw with the proxy in its environment, and its answer is the JSON envelope of
``--json``. Each run has a session of its own, so that many can run side by side and none sees another's history.

Limits: OpenClaw's tools run with the user's rights: the folder is where it works, not a jail.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaclaw_core.rollout.tasks import Outcome, Task

_GRACE = 10.0  # seconds over OpenClaw's own deadline
_TAIL = 600


class OpenClawAgent:
    def __init__(self, environment: Mapping[str, str], *, model: str | None, timeout_s: float, command: Sequence[str] = ("openclaw",)) -> None:
        """`environment` is the whole one of the child; `model` None: the one OpenClaw is set to."""
        self._environment = dict(environment)
        self._timeout_s = timeout_s
        self._command = [*command, "agent", "exec", "--json", "--timeout", str(round(timeout_s))]
        self._command += ["--no-auth-env-only", *(["--model", model] if model else [])]

    async def run(self, task: Task, workspace: Path) -> Outcome:
        message = workspace.with_name(f"{workspace.name}.task.md")
        message.write_text(task.instruction, encoding="utf-8")
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *("--message-file", str(message), "--cwd", str(workspace)),
                env=self._environment,
                cwd=workspace,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as e:
            return Outcome("failed", error=f"{self._command[0]} can't be run: {e.strerror}.")
        try:
            out, err = await asyncio.wait_for(process.communicate(), self._timeout_s + _GRACE)
        except TimeoutError:
            return Outcome("timeout", error=f"No end after {self._timeout_s:.0f} s.")
        finally:
            if process.returncode is None:
                _end(process)
                await process.wait()
            message.unlink(missing_ok=True)
        return outcome_of(out.decode(errors="replace"), err.decode(errors="replace"), process.returncode)


def _end(process: asyncio.subprocess.Process) -> None:
    """With the tools it has started: they are of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def outcome_of(out: str, err: str, status: int | None) -> Outcome:
    """What the envelope on stdout says."""
    envelope = _envelope(out)
    if envelope is None:
        said = (err.strip() or out.strip())[-_TAIL:]
        return Outcome("failed", error=f"OpenClaw ended with status {status} and said: {said or 'nothing'}")
    return _outcome(envelope, status)


def _envelope(out: str) -> dict[str, Any] | None:
    start = out.find("{")
    with contextlib.suppress(ValueError):
        value, _ = json.JSONDecoder().raw_decode(out[start:] if start >= 0 else "")
        return value if isinstance(value, dict) else None
    return None


def _outcome(envelope: Mapping[str, Any], status: int | None) -> Outcome:
    reply, session, steps = (envelope.get(name) for name in ("final", "sessionId", "assistantTurns"))
    done = bool(envelope.get("ok")) and status == 0
    word = str(envelope.get("status") or "")
    error = envelope.get("error")
    said = error.get("message") if isinstance(error, dict) else error
    return Outcome(
        "done" if done else "timeout" if "timeout" in word else "failed",
        reply=reply if isinstance(reply, str) else None,
        error=None if done else str(said or f"OpenClaw ended with status {word or status}.")[:_TAIL],
        session=session if isinstance(session, str) else None,
        steps=steps if isinstance(steps, int) else None,
    )
