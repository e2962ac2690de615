"""Are there known security advisories for what the lock files pin? Asks the OSV database once: `scripts/audit`.

    scripts/audit [--lock requirements/full.lock …] [--json]

Exit status: 0 none known, or not checked (the database can't be reached: that is said, and nothing is claimed); 1 there are
some; 2 a lock file can't be read. Only names and versions of published packages are sent, one request for up to 1,000 of
them; a second one per advisory brings its title.

Limits: what the database does not know of is not found. Advisories for mitmproxy, Python itself and the system's libraries
are in it only as far as they are packages of PyPI.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "requirements"
DATABASE = "https://api.osv.dev"
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)


class NotReached(Exception):
    """The database gave no answer that can be used."""


@dataclass(frozen=True)
class Finding:
    package: str
    version: str
    advisory: str
    title: str
    fixed: tuple[str, ...]  # versions; (): none is named


def pinned(lock: str) -> dict[str, str]:
    """Package → version of a lock file."""
    return {name.lower().replace("_", "-"): version for name, version in _PINNED.findall(lock)}


def ask(database: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(database + path, data, {"content-type": "application/json", "user-agent": "metaclaw-audit"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)
    except (OSError, ValueError) as e:  # URLError is an OSError
        raise NotReached(f"{database} can't be asked ({getattr(e, 'reason', e)})") from e


def audit(packages: dict[str, str], database: str) -> list[Finding]:
    """Raises NotReached."""
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages.items()]
    found: list[Finding] = []
    try:
        for at in range(0, len(queries), 1000):
            answer = ask(database, "/v1/querybatch", {"queries": queries[at : at + 1000]})
            for (name, version), result in zip(list(packages.items())[at : at + 1000], answer["results"], strict=True):
                for advisory in result.get("vulns") or ():
                    found.append(described(name, version, advisory["id"], database))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise NotReached(f"{database} does not answer as the OSV database does ({e!r})") from e
    return found


def described(name: str, version: str, advisory: str, database: str) -> Finding:
    told = ask(database, f"/v1/vulns/{advisory}")
    fixed = {
        event["fixed"]
        for affected in told.get("affected", ())
        if affected.get("package", {}).get("name", "").lower().replace("_", "-") == name
        for ranges in affected.get("ranges", ())
        if ranges.get("type") == "ECOSYSTEM"
        for event in ranges.get("events", ())
        if "fixed" in event
    }
    aliases = [alias for alias in told.get("aliases", ()) if alias.startswith("CVE-")]
    return Finding(name, version, " ".join([advisory, *aliases]), (told.get("summary") or told.get("details", "")).split("\n")[0][:120], tuple(sorted(fixed)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", type=Path, nargs="+", default=sorted(LOCKS.glob("*.lock")))
    parser.add_argument("--database", default=DATABASE)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    packages: dict[str, str] = {}
    for lock in args.lock:
        try:
            packages |= pinned(lock.read_text(encoding="utf-8"))
        except OSError as e:
            print(f"{lock} can't be read: {e.strerror}", file=sys.stderr)
            return 2
    problem, found = None, []
    try:
        found = audit(packages, args.database)
    except NotReached as e:
        problem = str(e)
    if args.json:
        print(json.dumps({"checked": problem is None, "problem": problem, "packages": len(packages), "findings": [asdict(f) for f in found]}))
    elif problem is not None:
        print(f"not checked: {problem}. Nothing is known about the {len(packages)} pinned packages.")
    else:
        for f in found:
            print(f"{f.package} {f.version}: {f.advisory}: {f.title}; fixed in {', '.join(f.fixed) or 'no version yet'}")
        print(f"{len(packages)} pinned packages, {len(found)} known advisories.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
