"""A local server of the Tinker wire protocol on torch and transformers.

Design: the client is always the real ``tinker`` SDK (0.38), so nothing above this package knows which
backend it talks to: ``TINKER_BASE_URL`` decides. One process, one base model, many LoRA adapters on it.
One thread (`worker`) does all the arithmetic and interleaves training calls with decode steps; the HTTP
side (`server`) only parses, queues and waits. What is saved is one safetensors file per checkpoint.

Not here: several models or GPUs in one process, images, the losses gspo, stable_reinforce and server-side
custom ones (client-side custom losses work), optimizers other than AdamW. Each is refused by name.
Importing this package costs nothing; torch is imported by the modules that need it.
"""
