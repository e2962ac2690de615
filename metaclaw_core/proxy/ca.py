"""The CA of `metaclaw start`, in a 0700 folder of ours: made once, never copied, trusted per process.

Design: mitmproxy makes and reads it; here is only what must be right before anything else, so that a CA that can't
be made or read is one sentence and not a traceback in the middle of the start.
"""

from __future__ import annotations

from pathlib import Path

from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import home, private_dir

CERTIFICATE = "mitmproxy-ca-cert.pem"


def confdir() -> Path:
    return home() / "mitmproxy"


def ensure_ca(folder: Path) -> Path:
    """The certificate that clients must trust, made together with its key if there is none. Raises ConfigError."""
    from mitmproxy.certs import CertStore

    try:
        if folder == confdir():
            private_dir(folder.parent)
            private_dir(folder)
        CertStore.from_store(folder, "mitmproxy", 2048)
    except OSError as e:
        raise ConfigError(
            f"The CA can't be made or read in {folder} ({e.strerror or e}): make this folder yours and writable, "
            "or move everything with METACLAW_HOME."
        ) from e
    except ValueError as e:
        raise ConfigError(
            f"The CA in {folder} is damaged ({e}). Move that folder away and start again: a new CA is made, and agents "
            "get it by `metaclaw run` or `metaclaw env`."
        ) from e
    return folder / CERTIFICATE
