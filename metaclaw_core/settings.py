"""One settings model for every process.

Design: ``config.yaml`` < environment ``METACLAW_*`` < ``--set metaclaw_*`` < command-line flags; each
layer is a nested dict, merged and validated once. The keys of the reference system keep their names
and defaults. An unknown key or a bad value is a `ConfigError` that names the key, the value and what
is allowed. This module is the only reader of the environment.

The environment name of a key is its path in capitals joined with ``_``: ``skills.top_k`` is
``METACLAW_SKILLS_TOP_K``. ``METACLAW_HOME`` is no setting: it says where the file is.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator, Mapping
from datetime import time
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from metaclaw_core.addresses import forbidden_url
from metaclaw_core.errors import ConfigError

_ENV = os.environ  # noqa: TID251 - the one place
ENVIRONMENT = "the environment"
_NOT_SETTINGS = ("HOME", "SHARED", "TEST_", "NO_", "SKIP_", "BENCH_")


def parse_hours(text: str) -> tuple[time, time]:
    """``"23:00-06:30"`` as its two ends. Raises ValueError."""
    found = re.fullmatch(r"(\d\d):(\d\d)-(\d\d):(\d\d)", text.replace(" ", ""))
    if found is None:
        raise ValueError(f"{text!r} is no pair of times such as 01:00-07:00")
    a, b, c, d = map(int, found.groups())
    return time(a, b), time(c, d)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _a_key_is_one_word(cls, value: Any, info: ValidationInfo) -> Any:
        """White space around a key came along with the copying; inside it, or a typographic dash, no server takes it."""
        if not isinstance(value, str) or not str(info.field_name).endswith("_key"):
            return value
        if not all("!" <= c <= "~" for c in value.strip()):
            raise ValueError("a key has no spaces, line breaks or letters outside ASCII; copy it again")
        return value.strip()


class LLM(_Section):
    """The LLM that writes skills (and may judge); empty: the caller's own model and key, for skills only."""

    provider: Literal["", "kimi", "qwen", "openai", "openrouter", "ollama", "custom"] = ""
    model_id: str = ""
    api_base: str = ""
    api_key: str = ""
    use_caller_credentials: bool = True  # nothing configured: skills are written with the caller's own model and key
    daily_token_budget: int | None = Field(2_000_000, ge=0)  # tokens a UTC day of all our own calls; None: no limit
    timeout_seconds: float = Field(120, gt=0, le=3600)  # for one whole answer
    concurrency: int = Field(8, ge=1, le=256)  # requests at a time


class Judge(_Section):
    """The judge uses rl.prm_* where set, else llm.*; with neither, nothing is scored."""

    enabled: bool = True
    votes: int = Field(3, ge=1, le=15)
    models: tuple[str, ...] = ()  # that vote in turn at the judge's endpoint; (): its one model
    patience: float = Field(1800, ge=0)  # seconds to wait for what the human or the tools say to a reply
    temperature: float = Field(0.6, ge=0, le=2)
    max_tokens: int = Field(1024, ge=16, le=32_768)  # of one vote
    timeout_seconds: float = Field(60, gt=0, le=3600)


class Proxy(_Section):
    port: int = Field(30000, ge=1, le=65535)
    intercept: Literal["llm", "all"] = "llm"  # what `metaclaw start` decrypts
    hosts: tuple[str, ...] = ()  # further LLM hosts that are trusted like the known providers
    websocket: Literal["fallback", "pass"] = "fallback"  # 426, so that the client uses plain HTTP; or let it pass
    max_body_mb: int = Field(32, ge=1, le=1024)  # larger request bodies pass through, counted
    redact_dumps: bool = False  # secrets are replaced in what mitmproxy's -w and hardump write too; -C then lacks its keys


class Skills(_Section):
    enabled: bool = True
    dir: str = "~/.metaclaw/skills"
    extra_dirs: tuple[str, ...] = ()  # e.g. ~/.openclaw/skills, ~/.claude/skills; read only
    retrieval_mode: Literal["tfidf", "template", "embedding"] = "tfidf"
    top_k: int = Field(6, ge=1, le=50)
    task_specific_top_k: int = Field(10, ge=0, le=50)  # template mode only
    max_injected_tokens: int = Field(2000, ge=100, le=50_000)
    placement: Literal["system", "turn"] = "system"  # of what is added later in an epoch: to the block, or beside what was said
    idle_minutes: int = Field(60, ge=1)  # a longer pause starts a new epoch: the provider's cache is gone anyway
    auto_evolve: bool = True
    session_idle_minutes: int = Field(30, ge=1)  # a longer pause ends what skills are written from
    admission: Literal["immediate", "review"] = "immediate"  # of what a human said himself; the rest always waits for review
    stale_days: int = Field(30, ge=1)  # a learned skill that was not injected for so long is marked stale
    embedding_url: str = ""  # OpenAI-compatible /v1 base for retrieval_mode: embedding
    embedding_model: str = ""
    embedding_api_key: str = ""


class RL(_Section):
    enabled: bool = False
    model: str = ""
    tinker_api_key: str = ""
    tinker_base_url: str = ""  # "": Tinker's cloud, or what TINKER_BASE_URL says; a local engine: http://127.0.0.1:PORT
    prm_url: str = ""
    prm_model: str = ""
    prm_api_key: str = ""
    lora_rank: int = Field(32, ge=1)
    batch_size: int = Field(4, ge=1)
    min_sessions: int = Field(1, ge=1)  # a batch holds turns of at least this many sessions
    resume_from_ckpt: str = ""
    evolver_api_base: str = ""
    evolver_api_key: str = ""
    evolver_model: str = ""
    support_share: float = Field(0.25, ge=0, le=1)  # of the sessions, in rl mode: they write skills and train nothing
    train: bool = True  # False: requests go to the own model as it is, and no step is made
    algorithm: Literal["single", "grpo"] = "single"  # logged replies, against a running expectation; or fresh siblings of one prompt
    group_size: int = Field(4, ge=2, le=64)  # grpo: siblings of each prompt; batch_size // group_size prompts make a step
    grpo_tools: bool = False  # grpo: also prompts inside a tool loop, or that were answered by a call; nothing is executed
    loss: Literal["importance_sampling", "cispo", "ppo"] = "importance_sampling"
    learning_rate: float | None = Field(None, gt=0)  # None: 2e-5 * sqrt(min(batch_size, 32) / 32)
    max_staleness: int = Field(2, ge=0)  # versions that a sample, or a session's pinned weights, may lag behind
    explore_share: float = Field(1.0, ge=0, le=1)  # of the sessions: sampled at T=1, so that they can be trained on
    control_share: float = Field(0.1, ge=0, lt=1)  # of the sessions: served by the stable version, to compare with
    warmup_turns: int = Field(50, ge=0)  # answered by the upstream first; the policy is only probed
    checkpoint_every: int = Field(10, ge=1)  # steps; which older states are kept
    checkpoint_ttl_hours: float = Field(168, ge=1)  # of what is no longer in use
    schedule: Literal["immediate", "windows"] = "immediate"
    sleep_hours: str = "01:00-07:00"  # local time; windows: training may run then
    idle_minutes: int = Field(15, ge=0)  # windows: and where no request came for so long; 0: only in sleep_hours
    daily_budget_usd: float | None = Field(None, ge=0)  # sampling, training, judge, siblings; None: no limit
    on_budget: Literal["base", "upstream"] = "base"  # who answers once it is spent: the untrained model, or the agent's own LLM

    @field_validator("tinker_base_url")
    @classmethod
    def _may_be_asked(cls, value: str) -> str:
        """Its client is Tinker's own, which can't be told where not to connect to."""
        if (problem := forbidden_url(value)) is not None:
            raise ValueError(f"it is {problem}")
        return value

    @field_validator("sleep_hours")
    @classmethod
    def _is_a_pair_of_times(cls, value: str) -> str:
        parse_hours(value)
        return value


class OPD(_Section):
    enabled: bool = False
    teacher_url: str = ""
    teacher_model: str = ""
    teacher_api_key: str = ""
    kl_penalty_coef: float = Field(1.0, ge=0)


class Policy(_Section):
    """The server that answers from the model being trained, in rl mode."""

    first_segment_timeout: float = Field(20, gt=0, le=600)  # seconds until the upstream is asked instead
    reasoning: bool = True  # let a model that can think do so, where its template knows a switch
    max_tokens: int = Field(4096, ge=16, le=262_144)  # of one answer, where the client names no limit


class Store(_Section):
    url: str = ""  # "": SQLite at METACLAW_HOME/store.db; postgresql+psycopg://… for a fleet


class Settings(_Section):
    mode: Literal["skills_only", "rl"] = "skills_only"
    llm: LLM = LLM()
    judge: Judge = Judge()
    proxy: Proxy = Proxy()
    skills: Skills = Skills()
    rl: RL = RL()
    opd: OPD = OPD()
    policy: Policy = Policy()
    store: Store = Store()
    max_context_tokens: int | None = Field(None, ge=1000)  # None: the model's own limit
    openclaw_env_data_dir: str = ""


def home() -> Path:
    """Where everything of ours lives: ``METACLAW_HOME`` or ``~/.metaclaw``."""
    return Path(_ENV.get("METACLAW_HOME") or "~/.metaclaw").expanduser()


def private_dir(path: Path) -> Path:
    """`path` as a directory that only its owner can enter; made if missing."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def leaves(model: type[BaseModel] = Settings, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key, in the order of the model."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, (*prefix, name))
        else:
            yield (*prefix, name)


def is_setting_variable(name: str) -> bool:
    """Is an environment variable meant as a setting? (``METACLAW_HOME`` and what the tests use are not.)"""
    return name.startswith("METACLAW_") and not name.removeprefix("METACLAW_").startswith(_NOT_SETTINGS)


def nest(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """``("a", "b"), v`` → ``{"a": {"b": v}}``."""
    for name in reversed(path):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def load_settings(*overrides: Mapping[str, Any]) -> Settings:
    """All layers, the file first; `overrides` are nested dicts, later ones win.

    Raises ConfigError.
    """
    return settings_and_sources(*overrides)[0]


def settings_and_sources(*overrides: Mapping[str, Any]) -> tuple[Settings, dict[tuple[str, ...], str]]:
    """The same, and for each key that is set where its value comes from: the path of the file, ``the environment`` or
    ``--set or a flag``. A key that is not in it has its default.

    Raises ConfigError.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [(str(config_file()), _file_layer()), (ENVIRONMENT, _env_layer())]
    layers += [("--set or a flag", layer) for layer in overrides]
    return _validated(layers)


def check_values(values: Mapping[str, Any], source: str) -> Settings:
    """The settings that `values` alone make, named `source` in what is wrong with them. Raises ConfigError."""
    return _validated([(source, values)])[0]


def _validated(layers: list[tuple[str, Mapping[str, Any]]]) -> tuple[Settings, dict[tuple[str, ...], str]]:
    merged: dict[str, Any] = {}
    source: dict[tuple[str, ...], str] = {}
    for name, layer in layers:
        _merge(merged, layer, source, name, ())
    try:
        return Settings.model_validate(merged), source
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(err, source) for err in e.errors())) from e


def config_file() -> Path:
    return home() / "config.yaml"


def _file_layer() -> dict[str, Any]:
    path = config_file()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise ConfigError(f"{path} can't be read ({e.strerror}): make it yours, or name another folder with METACLAW_HOME.") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text: {e}.") from e
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not valid YAML{where}: {getattr(e, 'problem', e)}. Mend it, or move it away: `metaclaw setup` writes a new one.") from e
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(value).__name__}.")
    return value


def _env_layer() -> dict[str, Any]:
    known = {"METACLAW_" + "_".join(path).upper(): path for path in leaves()}
    layer: dict[str, Any] = {}
    for name, value in _ENV.items():
        if not is_setting_variable(name):
            continue
        path = known.get(name)
        if path is None:
            raise ConfigError(f"{name} in the environment is not a known setting.{_nearest(name, known)}")
        _merge(layer, nest(path, typed(path, value)), {}, "", ())
    return layer


def field_of(path: tuple[str, ...]) -> FieldInfo:
    """The field of the model behind a key. Raises ConfigError where there is none."""
    model: Any = Settings
    info: FieldInfo | None = None
    for name in path:
        info = model.model_fields.get(name) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if info is None:
            break
        model = info.annotation
    if info is None or path not in leaves():
        known = {".".join(p): p for p in leaves()}
        raise ConfigError(f"{'.'.join(path)} is not a known setting.{_nearest('.'.join(path), known)}")
    return info


def typed(path: tuple[str, ...], text: str) -> Any:
    """What somebody wrote for a key, as YAML; a key that holds text takes it as it is, so that ``123`` stays text.

    A list may be written without brackets: ``a, b``.
    """
    annotation = field_of(path).annotation
    if annotation is str or not text:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the model says what is wrong with it
    if typing.get_origin(annotation) is tuple and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def is_secret(path: tuple[str, ...]) -> bool:
    """Whether the value of a key must not be shown."""
    return path[-1].endswith(("_key", "_token", "_secret", "password"))


def _merge(
    into: dict[str, Any], layer: Mapping[str, Any], source: dict[tuple[str, ...], str], name: str, at: tuple[str, ...]
) -> None:
    for key, value in layer.items():
        path = (*at, str(key))
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, source, name, path)
        else:
            into[key] = {} if isinstance(value, Mapping) else value
            source[path] = name
            if isinstance(value, Mapping):
                _merge(into[key], value, source, name, path)


def _explain(err: Any, source: Mapping[tuple[str, ...], str]) -> str:
    path = tuple(str(p) for p in err["loc"])
    key = ".".join(path)
    where = next((source[path[:n]] for n in range(len(path), 0, -1) if path[:n] in source), "the settings")
    if err["type"] == "extra_forbidden":
        remedy = f" `metaclaw config {key} --unset` takes it out." if where == str(config_file()) else ""
        return f"{key} is not a known setting (from {where}).{_nearest(key, {'.'.join(p): p for p in leaves()})}{remedy}"
    value = "***" if is_secret(path) else repr(err["input"])
    return f"{key} = {value} is not allowed (from {where}): {err['msg'].removeprefix('Value error, ')}."


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def skills_settings(settings: Settings) -> Skills:
    """The `skills` section with its folder resolved: the default one moves with ``METACLAW_HOME``."""
    skills = settings.skills
    if skills.dir == Skills.model_fields["dir"].default:
        return skills.model_copy(update={"dir": str(home() / "skills")})
    return skills
