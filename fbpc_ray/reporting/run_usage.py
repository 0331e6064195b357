"""Commands that repeat a run, and code that loads and uses its coreset."""

import shlex
from collections.abc import Sequence
from dataclasses import fields

from fbpc_ray.core.addresses import redacted
from fbpc_ray.core.config import Config, Output, Workers
from fbpc_ray.core.presets import PAPER, start_of, with_method
from fbpc_ray.core.storage import Remote
from fbpc_ray.execution.used_settings import uses
from fbpc_ray.reporting.document import Block, Code, Heading, Text
from fbpc_ray.reporting.run_facts import LAST_BITS
from fbpc_ray.reporting.run_reader import EndedRun

PLACES = {f.name for group in (Workers, Output) for f in fields(group)} - LAST_BITS
"""Settings of places and machines, which change no result."""

LOAD = """import json
from safetensors import safe_open

with safe_open({path!r}, "pt") as file:
    images, labels = file.get_tensor("images"), file.get_tensor("labels"){soft}
    facts = file.metadata()
mean, std, classes = (json.loads(facts[name]) for name in ("mean", "std", "classes"))
# images: {shape} float32, normalised by channel: pixels in 0..1 are images * std + mean
# labels: ({count},) int64, indices into classes"""
SOFT = [
    """
    soft_labels = file.get_tensor("soft_labels")""",
    """
# soft_labels: ({count}, {classes}) float32 logits; their softmax is p(class | image)""",
]
"""What is added for learned labels: to the block, and as a comment."""
REMOTE = """from fbpc_ray.core.storage import place
from fbpc_ray.data import coreset

images, labels, mean, std, classes, soft_labels = coreset.load(place({path!r}))[:6]
# images: {shape} float32, normalised by channel: pixels in 0..1 are images * std + mean
# labels: ({count},) int64, indices into classes"""


def command(config: Config) -> list[str]:
    """Return the command line that repeats a run in a new folder: a preset, and what differs from it and has a use."""
    (row, start), d = start_of(config), config.distillation
    before = with_method(start, d.method, d.ipc).flat() | {"method": start.distillation.method}
    words = ["fbpc", "distill", "--preset", row or PAPER]  # without a preset, sizes would be chosen for the data
    for name, value in config.flat().items():
        if name in PLACES or value == before[name] or not uses(config, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    return words


def how_to_repeat(run: EndedRun) -> list[Block]:
    commit = run.result["commit"]
    note = f"At commit {commit}, in a new folder; other settings have their defaults."
    return [Heading("To repeat it", 3), Code(redacted(wrap_command(command(run.config))), "sh"), Text(note)]


def wrap_command(words: Sequence[str], width: int = 88) -> str:
    """Format a shell command in lines of about `width` characters, each flag with its values."""
    lines = [""]
    for word in words:
        if (word.startswith("--") or len(lines[-1]) > width) and len(lines[-1]) + len(word) > width - 20:
            lines.append(" ")
        lines[-1] += f" {shlex.quote(word)}" if lines[-1] else shlex.quote(word)
    return " \\\n".join(lines)


def how_to_use(runs: Sequence[EndedRun]) -> list[Block]:
    blocks: list[Block] = [Heading("To use the coreset" if len(runs) == 1 else "To use the coresets")]
    for run in runs:
        images, path = run.coreset.images, run.run.coreset_path
        form = REMOTE if isinstance(path, Remote) else LOAD
        if run.label:
            blocks.append(Heading(run.name, 3))
        soft, comment = SOFT if run.coreset.soft_labels is not None else ("", "")
        facts = {"shape": tuple(images.shape), "count": len(images), "classes": len(run.coreset.classes)}
        code = (form + comment).format(path=str(path), soft=soft, **facts)
        blocks.append(Code(code, "python"))
    run = shlex.quote(str(runs[0].run.folder))
    lines = f"fbpc export {run} --format hf --out my-coreset\nfbpc evaluate {run} --architectures convnet-ln"
    return [
        *blocks,
        Text("To export it for Hugging Face datasets, or to evaluate it on another network:"),
        Code(lines, "sh"),
    ]
