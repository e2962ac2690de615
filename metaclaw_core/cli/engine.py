"""``metaclaw engine``: a local server of the Tinker protocol; ``metaclaw engine export``: a checkpoint for others."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import click

from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import home, private_dir


@click.group("engine", invoke_without_command=True)
@click.option("--model", help="Folder or hub id of the base model.")
@click.option("--name", help="What clients call it; default: the same.")
@click.option("--port", type=click.IntRange(0, 65535), default=8300, show_default=True, help="0: any free port.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: what torch takes.")
@click.option("--prefix-cache-mb", type=click.IntRange(0), default=2048, show_default=True)
@click.option("--dir", "root", type=click.Path(path_type=Path), help="Checkpoints; default: METACLAW_HOME/engine.")
@click.option("--json", "as_json", is_flag=True, help="The line that says it is ready, as JSON.")
@click.pass_context
def command(
    context: click.Context,
    model: str | None,
    name: str | None,
    port: int,
    device: str,
    dtype: str,
    threads: int | None,
    prefix_cache_mb: int,
    root: Path | None,
    as_json: bool,
) -> None:
    """Train and sample on this machine: the Tinker protocol over torch, on 127.0.0.1.

    Clients need TINKER_BASE_URL and TINKER_API_KEY as the line printed at start says.
    """
    context.obj = root or home() / "engine"
    if context.invoked_subcommand:
        return
    if not model:
        raise click.UsageError("Give --model, the folder or hub id of a base model.", context)
    _need_torch()
    import asyncio

    from metaclaw_core.engine.checkpoints import Checkpoints
    from metaclaw_core.engine.model import BaseModel, use_threads
    from metaclaw_core.engine.server import create_app, serve
    from metaclaw_core.engine.service import Engine

    if threads:
        use_threads(threads)
    checkpoints = Checkpoints(context.obj)
    key_file = checkpoints.root / "key"
    key = _key(key_file)
    base = BaseModel(model, name, device=device, dtype=dtype)

    def ready(url: str) -> None:
        kind = str(base.dtype).removeprefix("torch.")
        if as_json:
            click.echo(json.dumps({"url": url, "key_file": str(key_file), "model": base.name, "device": str(base.device)}))
        else:
            click.echo(
                f"metaclaw engine serves {base.name} ({base.device}, {kind}): "
                f"TINKER_BASE_URL={url} TINKER_API_KEY=$(cat {key_file})"
            )

    app = create_app(lambda: Engine(base, checkpoints, prefix_bytes=prefix_cache_mb * 2**20), key)
    asyncio.run(serve(app, port, ready))


@command.command("export")
@click.argument("path", metavar="TINKER_PATH")
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
@click.pass_obj
def export_(root: Path, path: str, target: Path) -> None:
    """Write a checkpoint as a PEFT adapter that transformers and vLLM load."""
    _need_torch()
    from metaclaw_core.engine.checkpoints import Checkpoints
    from metaclaw_core.engine.export import export

    layers = export(Checkpoints(root), path, target)
    click.echo(f"The adapter of {layers} layers is in {target}.")


def _need_torch() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("torch", "tinker", "transformers", "uvicorn") if find_spec(name) is None]:
        raise ConfigError(f"The engine needs {', '.join(missing)}: pip install 'metaclaw-mitmproxy[rl,local]'.")


def _key(file: Path) -> str:
    """The key of this machine's engines, made at the first start; the SDK insists on its first letters."""
    private_dir(file.parent)
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        key = f"tml-{secrets.token_urlsafe(32)}"
        file.touch(mode=0o600)
        file.write_text(key + "\n")
        return key
