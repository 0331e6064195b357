"""Evaluate files of coresets by several kinds of inference, and print one table: that of docs/gallery.md.

    python jobs/gallery.py benchmarks/coresets/*.safetensors --data parquet:PATH --json benchmarks/results/gallery.json

Each file is evaluated as by `fbpc evaluate --coreset FILE --inference NAME --num-chains COUNT --no-random`, and its
result goes into the JSON; the same command then evaluates what is missing, and files that have changed. Random images
are a file of their own. --dry-run evaluates nothing, and prints the table of what the JSON has.
"""

import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fbpc_ray.commands import main
from fbpc_ray.commands.parsing import parse
from fbpc_ray.core import files
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.tables import markdown_table
from fbpc_ray.data import coreset
from fbpc_ray.reproduction.summaries import SHOWN

SCORES = ("accuracy", "nll", "ece")


@dataclass(frozen=True)
class Arguments:
    """Scores of coresets under several kinds of inference."""

    coresets: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files of coresets."""
    data: str = "cifar10"
    """As `fbpc evaluate`."""
    inference: tuple[str, ...] = ("sghmc:1", "last-layer:3")
    """INFERENCE:COUNT, as --inference and --num-chains of `fbpc evaluate`."""
    backend: str = "serial"
    """As `fbpc evaluate`."""
    threads: int = 1
    """As `fbpc evaluate`."""
    dry_run: bool = False
    """Print the results that the JSON has, and evaluate nothing."""
    json: str = ""
    """File of all results: {name of the file: {inference: what `fbpc evaluate --json` writes}}."""


def gallery(argv: Sequence[str]) -> None:
    args = parse(Arguments, argv, "jobs/gallery.py", about=__doc__)
    counts = dict(map(parse_inference, args.inference))
    path = Path(args.json) if args.json else None
    results = json.loads(path.read_text()) if path and path.exists() else {}
    for name in () if args.dry_run else args.coresets:
        checksum = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
        for inference, count in counts.items():
            of_file = results.setdefault(Path(name).stem, {})
            known = of_file.get(inference, {})
            if (known.get("file"), len(known.get("eval_seeds", ()))) == (checksum, count):
                continue
            of_file[inference] = evaluate(args, name, inference, count) | {"file": checksum}
            if path:
                files.write_text(path, json.dumps(results, indent=1) + "\n")
    print(table([Path(name) for name in args.coresets], results, counts))


def parse_inference(word: str) -> tuple[str, int]:
    """Parse INFERENCE:COUNT. Raises UserError."""
    name, _, count = word.partition(":")
    if not count.isdecimal() or not int(count):
        raise UserError(f"--inference {word}: give INFERENCE:COUNT, such as last-layer:3")
    return name, int(count)


def evaluate(args: Arguments, name: str, inference: str, count: int) -> dict[str, Any]:
    """Run `fbpc evaluate`; return what it writes, without paths."""
    with tempfile.TemporaryDirectory(prefix="fbpc-gallery-") as folder:
        written = Path(folder) / "result.json"
        main.COMMANDS["evaluate"]([
            "--coreset", name, "--data", args.data, "--inference", inference, "--num-chains", str(count),
            "--backend", args.backend, "--threads", str(args.threads), "--json", str(written), "--no-random",
        ])  # fmt: skip
        result = json.loads(written.read_text())
    kind, colon, _ = args.data.partition(":")
    return result | {"data": f"{kind}:PATH" if colon else kind, "coreset": Path(name).name}


def table(paths: Sequence[Path], results: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Format a row for each file: its method, images and steps, and the scores under each inference; - for none."""
    header = ["coreset", "method", "images", "steps"]
    header += [f"`{inference}`: {', '.join(SHOWN[score].label for score in SCORES)}" for inference in counts]
    rows = []
    for path in paths:
        facts, images = coreset.metadata(path), len(coreset.load(path).images)
        of_file = results.get(path.stem, {})
        scores = [cell(of_file[inference]) if inference in of_file else "-" for inference in counts]
        rows.append([f"`{path.stem}`", f"`{facts.get('method', '')}`", str(images), facts.get("step", ""), *scores])
    return markdown_table(header, rows)


def cell(result: Mapping[str, Any]) -> str:
    """Format the mean of each score over chains, or trained networks, and over architectures."""
    each = result["coresets"]["given"].values()
    means = ((SHOWN[name], statistics.mean(value for scores in each for value in scores[name])) for name in SCORES)
    return ", ".join(f"{shown.scale * mean:.{shown.digits}f}" for shown, mean in means)


if __name__ == "__main__":
    main.run(gallery, sys.argv[1:])
