"""The built-in agent: a chat model, a few file tools, and a loop. For people who have no OpenClaw at hand.

Design: OpenAI-compatible chat completions through the proxy, all calls of a task under one ``traceparent``, so that they are
recorded as one human turn with its tool loop. Tools work in the task's folder only: a path that leads out of it is refused,
links included. A shell is offered only where bubblewrap (``bwrap``) can shut it in: without network, the rest of the disk
read-only, the home folder hidden.

Limits: text only; a tool's result is cut at 20,000 characters; no streaming.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Self

import httpx

from metaclaw_core.errors import WireError
from metaclaw_core.learn.endpoint import Endpoint
from metaclaw_core.model import Json
from metaclaw_core.rollout.tasks import Outcome, Task
from metaclaw_core.wire.jsonio import loads_object

SYSTEM = (
    "You work on one task in one folder, with the tools you are given. Paths are relative to that folder. Look at what is "
    "there before you change it, check what you did, and end with a short answer that says what was done."
)
_CUT = 20_000
_SHELL_SECONDS = 60.0


class ToolError(Exception):
    """Told to the model as the tool's result."""


class ToolLoop:
    """``async with ToolLoop(…) as agent``."""

    def __init__(
        self, endpoint: Endpoint, *, proxy: str | None, verify: ssl.SSLContext | bool = True, timeout_s: float, max_steps: int = 20
    ) -> None:
        """`proxy`: URL of ours; None: connect directly. `max_steps`: calls of the LLM a task may take."""
        self._endpoint, self._timeout_s, self._max_steps = endpoint, timeout_s, max_steps
        headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._http = httpx.AsyncClient(
            proxy=proxy, verify=verify, trust_env=False, headers=headers, timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None)
        )
        self.has_shell = shutil.which("bwrap") is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        await self._http.aclose()

    async def run(self, task: Task, workspace: Path) -> Outcome:
        try:
            return await asyncio.wait_for(self._loop(task, workspace), self._timeout_s)
        except TimeoutError:
            return Outcome("timeout", error=f"No end after {self._timeout_s:.0f} s.")
        except (httpx.HTTPError, WireError) as e:
            return Outcome("failed", error=f"{self._endpoint.url}: {str(e) or type(e).__name__}")

    async def _loop(self, task: Task, workspace: Path) -> Outcome:
        trace = token_hex(16)
        messages: list[dict[str, Json]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task.instruction}]
        for step in range(1, self._max_steps + 1):
            body = {"model": self._endpoint.model, "messages": messages, "tools": tools(shell=self.has_shell)}
            answer = await self._http.post(self._endpoint.url, json=body, headers={"traceparent": f"00-{trace}-{token_hex(8)}-01"})
            if answer.status_code != 200:
                return Outcome("failed", error=f"{self._endpoint.url} answered {answer.status_code}: {answer.text[:400]}", steps=step)
            message = _message(answer.content)
            calls = message.get("tool_calls") or []
            if not calls:
                return Outcome("done", reply=str(message.get("content") or ""), steps=step)
            messages.append(message)
            for call in calls:
                messages.append({"role": "tool", "tool_call_id": call.get("id"), "content": await _result(call, workspace)})
        return Outcome("failed", error=f"No end after {self._max_steps} calls of the LLM.", steps=self._max_steps)


def _message(body: bytes) -> dict[str, Any]:
    """Raises WireError for what is no chat completion."""
    value = loads_object(body, "answer of the LLM")
    try:
        message = value["choices"][0]["message"]
    except (KeyError, IndexError, TypeError):
        message = None
    if not isinstance(message, dict) or not all(isinstance(c, dict) for c in message.get("tool_calls") or []):
        raise WireError("The answer of the LLM holds no message.")
    return message


async def _result(call: Mapping[str, Any], workspace: Path) -> str:
    function = call.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    try:
        if not isinstance(function, dict) or name not in _TOOLS:
            raise ToolError(f"There is no tool {name!r}.")
        arguments = loads_object(str(function.get("arguments") or "{}").encode(), "arguments")
        if name == "run":
            return (await _shell(workspace, _argument(arguments, "command")))[:_CUT]
        return (await asyncio.to_thread(_FILE_TOOLS[name], workspace, arguments))[:_CUT]
    except (ToolError, WireError) as e:
        return f"error: {e}"
    except OSError as e:
        return f"error: {e.strerror}"


# --- tools ----------------------------------------------------------------------------------------


def tools(*, shell: bool) -> list[dict[str, Json]]:
    """The declarations, as OpenAI functions."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {
                    "type": "object",
                    "properties": {argument: {"type": "string"} for argument in arguments},
                    "required": list(arguments),
                },
            },
        }
        for name, (description, arguments) in _TOOLS.items()
        if shell or name != "run"
    ]


_TOOLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "list": ("Names in a folder; folders end with a slash.", ("path",)),
    "read": ("The text of a file.", ("path",)),
    "write": ("Write a text file, replacing what is there; missing folders are made.", ("path", "content")),
    "run": ("Run a shell command in the folder; no network, one minute.", ("command",)),
}


def _argument(arguments: Mapping[str, Json], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise ToolError(f"{name} must be a text.")
    return value


def _inside(workspace: Path, path: str) -> Path:
    root = workspace.resolve()
    found = (root / path).resolve()
    if found != root and root not in found.parents:
        raise ToolError(f"{path} is outside of the task's folder.")
    return found


def _list(workspace: Path, arguments: Mapping[str, Json]) -> str:
    entries = sorted(_inside(workspace, _argument(arguments, "path")).iterdir())
    return "\n".join(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries) or "(empty)"


def _read(workspace: Path, arguments: Mapping[str, Json]) -> str:
    with _inside(workspace, _argument(arguments, "path")).open(encoding="utf-8", errors="replace") as file:
        return file.read(_CUT)


def _write(workspace: Path, arguments: Mapping[str, Json]) -> str:
    path, content = _inside(workspace, _argument(arguments, "path")), _argument(arguments, "content")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return f"{len(content)} characters written"


_FILE_TOOLS: dict[str, Callable[[Path, Mapping[str, Json]], str]] = {"list": _list, "read": _read, "write": _write}


async def _shell(workspace: Path, command: str) -> str:
    if shutil.which("bwrap") is None:
        raise ToolError("There is no shell here.")
    jail = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    jail += ["--tmpfs", str(Path.home()), "--tmpfs", "/tmp", "--bind", str(workspace), str(workspace), "--chdir", str(workspace)]  # noqa: S108 - inside
    jail += ["--clearenv", "--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--setenv", "HOME", str(workspace)]
    process = await asyncio.create_subprocess_exec(
        *jail, "sh", "-c", command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), _SHELL_SECONDS)
    except TimeoutError as e:
        raise ToolError(f"No end after {_SHELL_SECONDS:.0f} s.") from e
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return f"{out.decode(errors='replace')[:_CUT]}\n[exit status {process.returncode}]"
