"""What a test's machine believes of names and authorities: for processes that call an LLM by themselves.

The worker does not sit behind the kit's upstream_map.py, so its own call of a caller's provider would leave the
machine. Here a folder for PYTHONPATH is written whose ``sitecustomize`` lets the provider's names, and only them,
end at the scripted LLM, with the kit's authority as the only one that is trusted. Above the socket nothing is changed:
URL, Host, SNI and the check of the certificate are those of real life. A name that is not listed resolves to nothing.
"""

from __future__ import annotations

from pathlib import Path

_SITE = '''
import asyncio, os, socket
import certifi

HOSTS = set(os.environ["KIT_LLM_HOSTS"].split(","))
PORT = int(os.environ["LLM_TLS_PORT"])
OURS = ("127.0.0.1", "localhost", "::1")
certifi.where = lambda: {ca!r}
resolve, connect = socket.getaddrinfo, asyncio.BaseEventLoop.create_connection

def getaddrinfo(host, port, *arguments, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if name in HOSTS:
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", PORT))]
    if name is not None and name not in OURS:
        raise socket.gaierror(socket.EAI_NONAME, f"{{name}} is not on this test's map")
    return resolve(host, port, *arguments, **options)

async def create_connection(self, factory, host=None, port=None, **options):
    if port == 443 and host in (*OURS, *HOSTS):
        host, port = "127.0.0.1", PORT
    return await connect(self, factory, host, port, **options)

socket.getaddrinfo, asyncio.BaseEventLoop.create_connection = getaddrinfo, create_connection
'''


def site_folder(folder: Path, ca: Path) -> Path:
    """Write it; what PYTHONPATH must name. KIT_LLM_HOSTS and LLM_TLS_PORT are read when a process starts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE.format(ca=str(ca)))
    return folder
