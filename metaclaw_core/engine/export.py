"""A checkpoint as a PEFT adapter: a folder that ``peft.PeftModel.from_pretrained`` and vLLM load.

Nothing is converted: PEFT's ``lora_A``/``lora_B`` have our shapes and its scale is ``lora_alpha / r`` too.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from metaclaw_core.engine.checkpoints import Checkpoints, Place
from metaclaw_core.engine.errors import EngineError
from metaclaw_core.engine.lora import ALPHA


def export(checkpoints: Checkpoints, path: str, target: Path) -> int:
    """Write the adapter of the checkpoint at `path` into the folder `target`; the number of layers.

    Raises EngineError if the folder holds an adapter already or there is no such checkpoint.
    """
    if (target / "adapter_config.json").exists():
        raise EngineError(f"{target} holds an adapter already.")
    checkpoint, tensors = checkpoints.load(Place.parse(path), torch.device("cpu"))
    layers = sorted(name.removesuffix(".A") for name in tensors if name.endswith(".A"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.about.base_model,
        "r": checkpoint.about.lora.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
    }
    weights = {
        f"base_model.model.{layer}.lora_{part}.weight": tensors[f"{layer}.{part}"] for layer in layers for part in "AB"
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(layers)
