"""What was configured: settings, the keys they need, skills that are skipped, time-outs of the agent.

Limits: whether a key works is not tried; that would cost a request to its provider (`--tinker` tries Tinker's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from metaclaw_core.doctor import Check
from metaclaw_core.errors import ConfigError
from metaclaw_core.providers import host_of
from metaclaw_core.settings import Settings, config_file, load_settings, skills_settings
from metaclaw_core.skills.library import open_library

_SHORT_TIMEOUT = 60.0  # seconds; a policy model's first words may take half of it
_LOCAL = ("localhost", "127.0.0.1", "::1")


def read_settings() -> tuple[Settings | None, Check]:
    """The settings, None where they are wrong."""
    try:
        settings = load_settings()
    except ConfigError as e:
        first, _, rest = str(e).partition("\n")
        more = f" ({rest.count(chr(10)) + 1} more)" if rest else ""
        return None, Check("config", "fail", first + more, f"Mend {config_file()}; `metaclaw config show` lists every key.")
    where = str(config_file()) if config_file().exists() else "the defaults (`metaclaw setup` writes a file)"
    return settings, Check("config", "ok", f"mode {settings.mode}, from {where}")


def check_llm(settings: Settings) -> Check:
    llm = settings.llm
    if not (llm.provider or llm.api_base):
        if not settings.skills.auto_evolve:
            return Check("llm key", "ok", "No skills are written (skills.auto_evolve is off), so no key is needed")
        if llm.use_caller_credentials:
            return Check("llm key", "ok", "Skills are written with the agent's own model and key, held in memory only")
        return Check(
            "llm key", "warn", "No LLM is configured, and the agent's own must not be used: no skills are written.",
            "metaclaw setup, or metaclaw config llm.use_caller_credentials true",
        )  # fmt: skip
    if not llm.api_key and llm.provider != "ollama" and host_of(llm.api_base) not in _LOCAL:
        return Check("llm key", "fail", f"llm.{'provider' if llm.provider else 'api_base'} is set without a key.", "metaclaw config llm.api_key -")
    return Check("llm key", "ok", f"{llm.model_id or llm.provider or llm.api_base} is configured with a key")


def check_tinker(settings: Settings, environment: Mapping[str, str]) -> Check:
    if settings.mode != "rl":
        return Check("tinker key", "ok", f"Not needed in mode {settings.mode}")
    rl = settings.rl
    base = rl.tinker_base_url or environment.get("TINKER_BASE_URL", "")
    if not rl.model:
        return Check("tinker key", "fail", "rl.model is not set, so there is nothing to train.", "metaclaw setup, or metaclaw config rl.model NAME")
    if not (rl.tinker_api_key or environment.get("TINKER_API_KEY")) and host_of(base) not in _LOCAL:
        return Check("tinker key", "fail", "Mode rl needs a Tinker key, and there is none.", "metaclaw config rl.tinker_api_key -, or a local engine: metaclaw engine")
    return Check("tinker key", "ok", f"{rl.model} at {base or 'Tinker'}; `metaclaw doctor --tinker` tries it")


def check_skills(settings: Settings) -> Check:
    places = skills_settings(settings)
    try:
        scan = open_library(places).scan()
    except OSError as e:
        return Check("skills", "fail", f"{e.filename} can't be read ({e.strerror}).", "Make it readable, or name another with metaclaw config skills.dir.")
    if scan.problems:
        listed = "; ".join(f"{problem.name}: {problem.reason}" for problem in scan.problems[:5])
        more = f"; and {len(scan.problems) - 5} more" if len(scan.problems) > 5 else ""
        return Check("skills", "warn", f"{len(scan.problems)} skills are invalid and skipped: {listed}{more}.", f"Mend them in {scan.problems[0].path.parent}; `metaclaw skills check` looks again.")
    return Check("skills", "ok", f"{len(scan.usable)} usable, {len(scan.candidates)} waiting for review ({Path(places.dir).expanduser()})")


def check_timeouts(settings: Settings, timeouts: Mapping[str, float]) -> Check:
    """`timeouts`: seconds that OpenClaw waits for a provider's stream, where its configuration says so."""
    short = {name: seconds for name, seconds in timeouts.items() if seconds < _SHORT_TIMEOUT}
    if short and settings.mode == "rl":
        listed = ", ".join(f"{name} {seconds:g} s" for name, seconds in sorted(short.items()))
        return Check("time-outs", "warn", f"OpenClaw gives up early: {listed}; a policy model's first words may take that long.", f"Set models.providers.<id>.timeoutSeconds to {_SHORT_TIMEOUT:g} or more, or remove it (120 s).")
    return Check("time-outs", "ok", "OpenClaw waits 120 s for a stream" if not timeouts else f"OpenClaw's own: {_listed(timeouts)}")


def _listed(timeouts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds:g} s" for name, seconds in sorted(timeouts.items()))


def check_conformance(results: Sequence[tuple[str, str, str]]) -> list[Check]:
    """(name, status, detail) of each experiment with the Tinker server."""
    status = {"ok": "ok", "differs": "warn", "skipped": "warn", "failed": "fail"}
    remedy = "Compare with the local engine (`metaclaw engine`); if only the cloud fails, Tinker's status page and your key."
    return [
        Check(f"tinker: {name}", status[found], detail, "" if found == "ok" else remedy)  # type: ignore[arg-type]
        for name, found, detail in results
    ]
