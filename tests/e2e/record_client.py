"""A mitmproxy script for tests: what the client sent, before any other addon could touch it.

It is named before the addon under test, so its `request` hook runs first. One JSON line per request:
path, headers in order and spelling, body (base64, for bodies are bytes).
"""

import json
from base64 import b64encode
from pathlib import Path

from mitmproxy import ctx, http
from mitmproxy.addonmanager import Loader


class RecordClient:
    def load(self, loader: Loader) -> None:
        loader.add_option("record_client", str, "", "Where the client's requests are written to, as JSON lines.")

    def request(self, flow: http.HTTPFlow) -> None:
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in flow.request.headers.fields]
        body = b64encode(flow.request.raw_content or b"").decode()
        line = json.dumps({"method": flow.request.method, "path": flow.request.path, "headers": fields, "body": body})
        with Path(ctx.options.record_client).open("a") as file:
            file.write(line + "\n")


addons = [RecordClient()]
