"""``metaclaw setup``: a few questions, one file.

Design: every question has a default, and Enter to the end gives a working skills-only set-up without any key: skills
come from disk, and the caller's own key does the rest. Each question is a flag too; a flag is an answer, so that
question is not asked, and ``--non-interactive`` takes the defaults for the others. The file is written once, at the
end, in one step: an interrupted wizard changes nothing. A second run starts from the values of the file and leaves
what it does not ask about as it is, comments included.

Limits: keys are taken as they are typed; whether they work is for `metaclaw doctor` to find out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from metaclaw_core import configfile
from metaclaw_core.cli.config import masked, value_of
from metaclaw_core.cli.presets import LOCAL_ENGINE, PRESETS, tinker_models
from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.learn.estimate import Estimate, TurnShape, estimate, proposed, shape_of
from metaclaw_core.learn.prices import Prices, load_prices
from metaclaw_core.settings import Settings, check_values, config_file, home, load_settings

_FRESH = """\
# Settings of MetaClaw. `metaclaw config show` lists every key with its value and where it comes from.
# METACLAW_* in the environment wins over this file, flags win over both.

# skills_only: skills and records. rl: requests are answered by a model of your own, which is trained on what comes of it.
mode: skills_only

# The LLM that writes skills and judges replies. Empty: your agent's own model and key, for skills only.
llm:
  provider: ""

proxy:
  port: 30000 # on 127.0.0.1

skills:
  auto_evolve: true # write new skills from finished sessions

rl:
  enabled: false
  # A training step takes 32 turns from at least 4 sessions; smaller batches learn from noise.
  batch_size: 32
  min_sessions: 4
"""
_NONE = "none"
_RL_MODEL = "Qwen/Qwen3.5-4B"


@dataclass(frozen=True, slots=True)
class Asker:
    """Where answers come from: a flag, the person, or the default."""

    flags: Mapping[str, Any]
    interactive: bool

    def ask(self, flag: str, question: str, default: Any, kind: click.ParamType[Any] | None = None) -> Any:
        if (given := self.flags.get(flag)) is not None:
            return given
        if not self.interactive:
            return default
        return click.prompt(question, default=default, type=kind, show_default=default != "")

    def secret(self, flag: str, question: str, old: str, path: configfile.Key) -> str:
        """Nothing typed keeps `old`; a single - forgets it."""
        if (given := self.flags.get(flag)) is not None:
            return str(given)
        if not self.interactive:
            return old
        hint = f" [Enter keeps {masked(path, old)}, - removes it]" if old else " [Enter: none]"
        typed: str = click.prompt(question + hint, default="", show_default=False, hide_input=True)
        return "" if typed == "-" else typed or old

    def yes(self, flag: str, question: str, default: bool) -> bool:
        if (given := self.flags.get(flag)) is not None:
            return bool(given)
        return click.confirm(question, default=default) if self.interactive else default


def _options[F: Callable[..., Any]](function: F) -> F:
    for option in reversed(
        (
            click.option("--non-interactive", is_flag=True, help="Ask nothing: flags, then the file's values, then defaults."),
            click.option("--mode", type=click.Choice(["skills_only", "rl"]), help="rl: train a model of your own and let it answer."),
            click.option("--provider", type=click.Choice([_NONE, *PRESETS]), help="LLM that writes skills; none: the agent's own."),
            click.option("--api-base", metavar="URL", help="Its OpenAI-compatible base URL."),
            click.option("--model", "model_id", metavar="ID", help="Its model."),
            click.option("--api-key", metavar="KEY", help="Its key. Better: METACLAW_LLM_API_KEY, which is not written down."),
            click.option("--port", type=click.IntRange(1, 65535), help="Of the proxy, on 127.0.0.1."),
            click.option("--auto-evolve/--no-auto-evolve", default=None, help="Write skills from finished sessions."),
            click.option("--rl-backend", type=click.Choice(["tinker", "local"]), help="Tinker's cloud or a local engine."),
            click.option("--tinker-key", metavar="KEY", help="Tinker's key; none: TINKER_API_KEY of the environment."),
            click.option("--tinker-url", metavar="URL", help="Base URL of the local engine."),
            click.option("--rl-model", metavar="ID", help="The base model to train."),
            click.option("--prm-url", metavar="URL", help="OpenAI-compatible endpoint of the judge; none: the LLM above."),
            click.option("--prm-model", metavar="ID"),
            click.option("--prm-key", metavar="KEY"),
            click.option("--batch-size", type=click.IntRange(1), help="Turns of a training step."),
            click.option("--min-sessions", type=click.IntRange(1), help="Sessions these turns come from, at least."),
        )
    ):
        function = option(function)
    return function


@click.command("setup")
@_options
def command(non_interactive: bool, **flags: Any) -> None:
    """Write config.yaml, by questions or by flags. A second run keeps what it does not ask about."""
    text = configfile.read_text()
    fresh = not text.strip()
    if fresh:
        text = _FRESH
    old = check_values(configfile.values_of(text), str(config_file()))
    try:
        answers = _answers(Asker(flags, interactive=not non_interactive), old)
    except click.Abort:
        hint = "" if sys.stdin.isatty() else " Nobody can be asked here: metaclaw setup --non-interactive."
        click.echo(f"\nNothing was changed{'' if fresh else f' in {config_file()}'}.{hint}", err=True)
        raise SystemExit(130) from None
    for path, value in answers.items():
        # What has its default already is not written down: a later version may know a better one.
        if value != value_of(old, path):
            text = configfile.set_value(text, path, value)
    new = check_values(configfile.values_of(text), "the answers")
    configfile.write_text(text)
    _farewell(new)


def _answers(asker: Asker, old: Settings) -> dict[configfile.Key, Any]:
    answers: dict[configfile.Key, Any] = {}
    answers["mode",] = mode = asker.ask(
        "mode", "Mode: skills_only, or rl (train a model of your own and let it answer)", old.mode, click.Choice(["skills_only", "rl"])
    )
    answers |= _llm(asker, old)
    answers["skills", "auto_evolve"] = asker.yes("auto_evolve", "Write new skills from finished sessions?", old.skills.auto_evolve)
    answers["proxy", "port"] = asker.ask("port", "Port of the proxy, on 127.0.0.1", old.proxy.port, click.IntRange(1, 65535))
    answers["rl", "enabled"] = mode == "rl"
    if mode == "rl":
        answers |= _rl(asker, old)
    for flag in ("batch_size", "min_sessions"):
        if asker.flags.get(flag) is not None:
            answers["rl", flag] = asker.flags[flag]
    return answers


def _llm(asker: Asker, old: Settings) -> dict[configfile.Key, Any]:
    provider = asker.ask(
        "provider",
        "LLM that writes skills (none: your agent's own model and key)",
        old.llm.provider or _NONE,
        click.Choice([_NONE, *PRESETS]),
    )
    if provider == _NONE:
        return {("llm", name): "" for name in ("provider", "api_base", "model_id", "api_key")}
    preset, same = PRESETS[provider], provider == old.llm.provider
    answers: dict[configfile.Key, Any] = {("llm", "provider"): provider}
    answers["llm", "api_base"] = asker.ask("api_base", "  Base URL", (same and old.llm.api_base) or preset.api_base)
    answers["llm", "model_id"] = asker.ask("model_id", "  Model", (same and old.llm.model_id) or preset.model_id)
    # A key belongs to its provider: it is not offered to another one.
    answers["llm", "api_key"] = asker.secret("api_key", "  API key", old.llm.api_key if same else "", ("llm", "api_key"))
    if not answers["llm", "api_base"]:
        raise ConfigError(f"The provider {provider} needs a base URL: --api-base URL.")
    return answers


def _rl(asker: Asker, old: Settings) -> dict[configfile.Key, Any]:
    answers: dict[configfile.Key, Any] = {}
    default = "local" if old.rl.tinker_base_url or asker.flags.get("tinker_url") else "tinker"
    backend = asker.ask(
        "rl_backend", "Train on: tinker (cloud), or local (`metaclaw engine`)", default, click.Choice(["tinker", "local"])
    )
    url = key = ""
    if backend == "local":
        url = asker.ask("tinker_url", "  Base URL of the engine", old.rl.tinker_base_url or LOCAL_ENGINE)
        key = old.rl.tinker_api_key
    else:
        key = asker.secret(
            "tinker_key", "  Tinker API key (none: TINKER_API_KEY)", old.rl.tinker_api_key, ("rl", "tinker_api_key")
        )
    answers["rl", "tinker_base_url"], answers["rl", "tinker_api_key"] = url, key
    answers["rl", "model"] = _rl_model(asker, old.rl.model, url, key)
    answers["rl", "prm_url"] = prm = asker.ask("prm_url", "Judge: base URL (none: the LLM above)", old.rl.prm_url or _NONE)
    if prm == _NONE:
        answers["rl", "prm_url"] = ""
        return answers
    answers["rl", "prm_model"] = asker.ask("prm_model", "  Judge's model", old.rl.prm_model)
    answers["rl", "prm_api_key"] = asker.secret("prm_key", "  Judge's API key", old.rl.prm_api_key, ("rl", "prm_api_key"))
    return answers


def _rl_model(asker: Asker, old: str, url: str, key: str) -> str:
    """The model to train, out of those that the server offers where it can be asked."""
    default = old or _RL_MODEL
    if not asker.interactive or asker.flags.get("rl_model") is not None:
        return str(asker.ask("rl_model", "", default))
    offer = tinker_models(url, key)
    if not offer.models:
        click.echo(f"  The list of models can't be had: {offer.problem or 'the server offers none'}. Type its name.")
        return str(asker.ask("rl_model", "  Model to train", default))
    shape = _recorded_shape()
    prices = Prices() if url else load_prices(home())  # an engine of one's own sends no bill
    estimates = [estimate(model, shape, prices) for model in offer.models]
    for number, one in enumerate(estimates, 1):
        click.echo(f"  {number:>3}  {_about(one)}")
    if shape is None and not url:
        click.echo("  What 100 turns cost is known once some were recorded: metaclaw start, use your agent, and come back.")
    if shape is not None:
        click.echo(f"  By your last {shape.turns:,} turns, of {shape.requests:.1f} requests each; the largest had {shape.longest:,} tokens.")
    suggestion = proposed(estimates, default)
    if suggestion is None:
        click.echo("  None of them holds your largest request; what is too long goes to the upstream.")
    typed = str(asker.ask("rl_model", "  Model to train (number or name)", suggestion or estimates[0].model.name))
    if typed.isdigit() and 1 <= int(typed) <= len(estimates):
        return estimates[int(typed) - 1].model.name
    return typed


def _about(one: Estimate) -> str:
    context = "" if one.model.max_context is None else f"  {one.model.max_context // 1000:,}k context"
    small = ", too small for your requests" if one.fits is False else ""
    price = "" if one.usd is None else f"  about ${one.usd:.2f} for 100 turns"
    return f"{one.model.name}{context}{small}{price}"


def _recorded_shape() -> TurnShape | None:
    """What the user's agent has asked so far; nothing is made where nothing was recorded."""
    from metaclaw_core.cli.output import opened_store

    try:
        if not (load_settings().store.url or (home() / "store.db").exists()):
            return None
        with opened_store() as store:
            return shape_of(store)
    except MetaClawError as e:  # the wizard is often run to mend just that
        click.echo(f"  What was recorded can't be read: {e}", err=True)
        return None


def _farewell(settings: Settings) -> None:
    click.echo(f"Wrote {config_file()}, readable by you only.")
    if settings.mode == "rl":
        warmup = settings.rl.warmup_turns
        click.echo(f"Mode rl: {settings.rl.model} answers once it is ready" + (f" and {warmup} turns were seen." if warmup else "."))
        if not (settings.rl.prm_url or settings.llm.api_base or settings.opd.enabled):
            click.echo("No judge yet: without rl.prm_url or llm.* nothing is scored, so nothing is trained.")
    if settings.llm.provider and PRESETS[settings.llm.provider].needs_key and not settings.llm.api_key:
        click.echo("llm.api_key is empty: set METACLAW_LLM_API_KEY, or `metaclaw config llm.api_key -`.")
    from metaclaw_core.proxy.control import running_proxies

    if any(running_proxies(home())):
        click.echo("A proxy is running: `metaclaw restart` lets it use the new settings.")
    else:
        click.echo("Next: metaclaw start")
