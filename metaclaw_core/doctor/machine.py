"""The machine: Python, mitmproxy, room on the disk, who can read our files, and the CA.

Limits: whether the CA's folder is in a repository is asked of the folders above it, and git is asked only whether it
ignores the file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from metaclaw_core.doctor import Check

NEEDED_PYTHON = (3, 12)
NEEDED_MITMPROXY = (12, 2)
_FAIL_BYTES, _WARN_BYTES = 200 << 20, 1 << 30
_DAY = 86400.0
KEY = "mitmproxy-ca.pem"  # certificate and key
_KEY_FILES = (KEY, "mitmproxy-ca.p12")


def check_python(version: tuple[int, ...], executable: str) -> Check:
    shown = ".".join(map(str, version[:3]))
    if version[:2] < NEEDED_PYTHON:
        wanted = ".".join(map(str, NEEDED_PYTHON))
        return Check("python", "fail", f"Python {shown} is too old.", f"Install MetaClaw with Python {wanted} or newer.")
    return Check("python", "ok", f"Python {shown} ({executable})")


def mitmproxy_version() -> str | None:
    try:
        return metadata.version("mitmproxy")
    except metadata.PackageNotFoundError:
        return None


def check_mitmproxy(version: str | None) -> Check:
    wanted = ".".join(map(str, NEEDED_MITMPROXY))
    if version is None:
        return Check("mitmproxy", "fail", "mitmproxy is not installed here.", f"pip install 'mitmproxy>={wanted}' into this environment.")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < NEEDED_MITMPROXY:
        return Check("mitmproxy", "fail", f"mitmproxy {version} is too old.", f"pip install -U 'mitmproxy>={wanted}'")
    return Check("mitmproxy", "ok", f"mitmproxy {version}")


def free_bytes(home: Path) -> int:
    folder = home
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_disk(free: int, home: Path) -> Check:
    shown = f"{free / (1 << 30):.1f} GiB" if free >= 1 << 30 else f"{free >> 20} MiB"
    remedy = "Make room, move METACLAW_HOME, or forget old sessions: metaclaw purge --before DATE."
    if free < _FAIL_BYTES:
        return Check("disk", "fail", f"Only {shown} are free for {home}: nothing more can be recorded soon.", remedy)
    return Check("disk", "warn" if free < _WARN_BYTES else "ok", f"{shown} are free for {home}", remedy if free < _WARN_BYTES else "")


@dataclass(frozen=True, slots=True)
class Entry:
    path: str
    mode: int
    uid: int


def entries(home: Path, skip: Iterable[str] = ("skills",)) -> list[Entry]:
    """The home first, then what lies in it; `skip`: folders that are meant to be shared."""
    found: list[Entry] = []
    skipped = {home / name for name in skip}
    for folder, folders, files in os.walk(home):
        here = Path(folder)
        folders[:] = [name for name in folders if here / name not in skipped and not (here / name).is_symlink()]
        for path in (here, *(here / name for name in files)):
            try:
                known = path.lstat()
            except FileNotFoundError:
                continue  # gone since
            found.append(Entry(str(path), known.st_mode & 0o777, known.st_uid))
    return found


def check_modes(found: list[Entry], uid: int) -> Check:
    if not found:
        return Check("files", "ok", "There is no METACLAW_HOME yet.")
    home = found[0]
    if strange := [entry for entry in found if entry.uid != uid]:
        return Check("files", "fail", f"{strange[0].path} belongs to another user.", f"chown -R {uid} {home.path}")
    open_ = [entry for entry in found if entry.mode & 0o077]
    if home in open_:
        return Check("files", "fail", f"{home.path} can be entered by others (mode {home.mode:04o}).", f"chmod 700 {home.path}")
    if open_:
        rest = f" and {len(open_) - 1} more" if len(open_) > 1 else ""
        return Check("files", "warn", f"{open_[0].path}{rest} would be readable by others if the folder were.", f"chmod -R go= {home.path}")
    return Check("files", "ok", f"{home.path} is its owner's alone")


@dataclass(frozen=True, slots=True)
class CA:
    """What lies in the CA's folder."""

    folder: Path
    expires_at: float | None  # unix seconds; None: no certificate, or none that can be read
    problem: str | None  # why it can't be read
    key_mode: int | None  # None: no key
    repository: Path | None  # a git repository that holds it and does not ignore it


def look_at_ca(folder: Path) -> CA:
    expires, problem, mode = None, None, None
    file = folder / KEY
    for name in _KEY_FILES:
        if (folder / name).exists():
            mode = (mode or 0) | ((folder / name).stat().st_mode & 0o777)
    if file.exists():
        try:
            from cryptography import x509  # mitmproxy's own

            expires = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc.timestamp()
        except (OSError, ValueError) as e:
            problem = str(e)
    return CA(folder, expires, problem, mode, _repository(file))


def _repository(file: Path) -> Path | None:
    root = next((parent for parent in file.parents if (parent / ".git").exists()), None)
    if root is None:
        return None
    try:
        asked = subprocess.run(["git", "-C", str(root), "check-ignore", "-q", str(file)], check=False, capture_output=True, timeout=10)  # noqa: S603, S607
    except (OSError, subprocess.TimeoutExpired):
        return root
    return None if asked.returncode == 0 else root


def check_ca(ca: CA, now: float | None = None) -> Check:
    now = time.time() if now is None else now
    renew = f"Move {ca.folder} away and `metaclaw restart`: a new CA is made; agents get it by `metaclaw run`, or `metaclaw wire` again."
    if ca.problem is not None:
        return Check("ca", "fail", f"The CA in {ca.folder} can't be read ({ca.problem}).", renew)
    if ca.expires_at is None:
        return Check("ca", "ok", "No CA has been made yet; the first start makes one.")
    if ca.key_mode is not None and ca.key_mode & 0o077:
        return Check("ca", "fail", f"Others can read the CA's key in {ca.folder}.", f"chmod -R go= {ca.folder}; if anybody may have read it: {renew}")
    if ca.repository is not None:
        return Check("ca", "fail", f"The CA's key lies in the git repository {ca.repository}.", "Move METACLAW_HOME out of it, or let git ignore it.")
    days = (ca.expires_at - now) / _DAY
    if days < 0:
        return Check("ca", "fail", f"The CA expired {-days:.0f} days ago.", renew)
    if days < 30:
        return Check("ca", "warn", f"The CA expires in {days:.0f} days.", renew)
    return Check("ca", "ok", f"The CA in {ca.folder} is valid for {days:.0f} days and its owner's alone")
