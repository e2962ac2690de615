"""How an LLM request shows in mitmdump, the console and mitmweb: what we made of it, then its messages.

Design: mitmproxy has no columns or panels for addons, but any addon may add a content view. This one
takes priority for requests that carry our metadata and shows model, session, kind, skills and the text
that was added; the rest of the body follows as a list of messages. It reads the flow only.
"""

from __future__ import annotations

from mitmproxy import contentviews, http

from metaclaw_core.errors import WireError
from metaclaw_core.model import Message, Opaque, Reasoning, Text, ToolCall, ToolResult
from metaclaw_core.wire import find_route

META = "metaclaw"
_SHORTEN = 600


class LLMView(contentviews.Contentview):
    name = "metaclaw"
    syntax_highlight = "none"

    def prettify(self, data: bytes, metadata: contentviews.Metadata) -> str:
        flow, message = metadata.flow, metadata.http_message
        if not isinstance(flow, http.HTTPFlow) or not isinstance(message, http.Request):
            raise ValueError("not an LLM request")
        found = find_route(message.method, message.path)
        if found is None:
            raise ValueError("not an LLM request")
        try:
            request = found[0].parse_request(data, message.path)
        except WireError as e:
            raise ValueError(str(e)) from e
        notes = flow.metadata.get(META) or {}
        lines = [f"{request.dialect}  model {request.model or '?'}  {'stream' if request.stream else 'one answer'}"]
        lines += [f"{name}: {notes[name]}" for name in ("agent", "session", "kind") if notes.get(name)]
        if notes.get("skills"):
            lines.append("skills: " + ", ".join(notes["skills"]))
        if notes.get("passed"):
            lines.append(f"unchanged: {notes['passed']}")
        if notes.get("block"):
            lines += ["", "--- text added by metaclaw ---", notes["block"], "--- end ---"]
        lines += ["", f"tools: {', '.join(tool.name for tool in request.tools) or 'none'}"]
        for item in request.messages:
            lines += ["", f"[{item.role}]", *_parts(item)]
        return "\n".join(lines).encode("utf-8", "replace").decode()  # a lone surrogate can't be printed

    def render_priority(self, data: bytes, metadata: contentviews.Metadata) -> float:
        flow, message = metadata.flow, metadata.http_message
        if not data or not isinstance(flow, http.HTTPFlow) or not isinstance(message, http.Request):
            return -1
        return 2 if find_route(message.method, message.path) else -1


def _parts(message: Message) -> list[str]:
    lines: list[str] = []
    for part in message.parts:
        match part:
            case Text(text=text):
                lines.append(_short(text))
            case Reasoning(text=text):
                lines.append(f"(reasoning) {_short(text)}")
            case ToolCall(name=name, arguments=arguments):
                lines.append(f"-> {name}({_short(arguments)})")
            case ToolResult(text=text):
                lines.append(f"<- {_short(text)}")
            case Opaque(type=kind):
                lines.append(f"({kind})")
    return lines


def _short(text: str) -> str:
    return text if len(text) <= _SHORTEN else f"{text[: _SHORTEN // 2]} … {len(text) - _SHORTEN} characters … {text[-_SHORTEN // 2 :]}"
