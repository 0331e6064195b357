"""Find the Parquet files of each split by the names of shards: one complete set of shards a split."""

import re
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.splits import choose, describe, listed
from fbpc_ray.data.walk import is_hidden, subfolders

NAME = re.compile(
    r"(?P<label>.+?)"
    r"(?:[-_.]?(?:part|shard|chunk)?[-_.]?(?P<index>[0-9]+)(?:[-_]of[-_](?P<count>[0-9]+))?)?"
    r"(?:[-.](?P<fingerprint>[0-9a-f]{8,}))?",
    re.IGNORECASE,
)
"""Without the suffix: train, train-3, train_part_3, train-00003-of-00010, train-00003-of-00010-0a1b2c3d4e5f6071."""


class ShardName(NamedTuple):
    """Parts of a shard's name."""

    label: str
    """Possible name of a split, such as train."""
    number: int | None
    total: int | None
    """Number of shards in the set, if the name has it."""
    fingerprint: str | None


def parse_shard(name: str) -> ShardName:
    """Parse the name of a shard without its suffix."""
    match = NAME.fullmatch(name)
    if match is None:
        return ShardName(name, None, None, None)
    label, index, count, fingerprint = match.group("label", "index", "count", "fingerprint")
    return ShardName(label, int(index) if index else None, int(count) if count else None, fingerprint)


def find_shards(path: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Find the files of each split, ordered by number, in `path` or `path`/data.

    Returns:
        {split: files}, and notes on other files.

    Raises:
        UserError: there is no train split, a shard is missing, or a split has two sets of shards.
    """
    if path.is_file():
        name = parse_shard(path.stem)
        part = name.total is not None and name.total > 1
        return {"train": [path]}, (f"{path}: one of {name.total} shards, read alone",) if part else ()
    splits, others, notes = {}, list[Path](), list[str]()
    for place in (path, path / "data"):
        files = defaultdict[str, list[Path]](list)
        for file in parquet_files(place):
            files[parse_shard(file.stem).label.lower()].append(file)
        chosen = choose(sorted(files), place)
        if "train" in chosen:
            if splits:
                raise UserError(f"{path} and {place} both hold a train split; give one of them: parquet:{place}")
            splits = {split: _one_set(place, split, files.pop(label)) for split, label in chosen.items()}
            notes += describe(chosen, (), place)
        others += chain.from_iterable(files.values())
    if not splits:
        raise _no_train(path, others)
    if others:
        names = listed(sorted(file.name for file in others))
        notes.append(f"left out {names} in {path}: not the names of train, validation or test files")
    return splits, tuple(notes)


def parquet_files(path: Path) -> list[Path]:
    """Return the Parquet files directly in `path`, ordered by the numbers in their names."""
    if not path.is_dir():
        return []
    files = (file for file in path.iterdir() if file.suffix.lower() == ".parquet" and not is_hidden(file.name))
    return sorted((file for file in files if not file.is_dir()), key=_natural)


def _one_set(place: Path, split: str, files: list[Path]) -> list[Path]:
    """Check that `files` are one set: a single file, numbered files, or all of N."""
    names = [parse_shard(file.stem) for file in files]
    kinds = {("numbered" if name.number is not None else "alone", name.total) for name in names}
    repeated = [index for index, times in Counter(name.number for name in names).items() if times > 1]
    for count in sorted(name.total for name in names if name.total is not None):
        same = [(name, file) for name, file in zip(names, files, strict=True) if name.total == count]
        indices = {name.number for name, _ in same}
        if not repeated and indices not in (set(range(count)), set(range(1, count + 1))):
            raise UserError(
                f"{place} holds {len(same)} of {count} files like {same[0][1].name} "
                f"({listed(file.name for _, file in same)}); fetch the others, or rename without '-of-{count:05d}' "
                "to use a part"
            )
    if len(kinds) > 1 or repeated:
        raise UserError(
            f"{place} holds several sets of files of the {split} split: {listed((f.name for f in files), 8)}; "
            "keep the files of one set"
        )
    return files


def _no_train(path: Path, files: list[Path]) -> UserError:
    if files:
        return UserError(
            f"no train split in {path}: it has {listed(sorted(file.name for file in files))}; name its files "
            "train*.parquet, e.g. train-00000-of-00001.parquet"
        )
    inner_folders = subfolders(path)
    inner = [child for child in inner_folders if parquet_files(child) or parquet_files(child / "data")]
    if "train" in choose([child.name for child in inner], path):
        return UserError(
            f"no .parquet file in {path}, but in {listed(child.name for child in inner)}: move the files of train to "
            f"{path / 'train-00000-of-00001.parquet'} and so on"
        )
    if inner:
        return UserError(
            f"no .parquet file in {path} or {path / 'data'}, but in the folders {listed(at.name for at in inner)}; "
            f"give one of them, e.g. parquet:{inner[0]}"
        )
    fix = f"give folder:{path} for folders of images" if inner_folders else "name the folder that holds them"
    return UserError(f"no .parquet file in {path} or {path / 'data'}; {fix}")


def _natural(file: Path) -> list[str | int]:
    """Split a name into text and numbers, a sort key that puts train-2 before train-10."""
    return [int(text) if turn % 2 else text for turn, text in enumerate(re.split(r"([0-9]+)", file.name))]


def has_parquet(path: Path) -> bool:
    """Tell whether `path` holds Parquet files, directly or in its folders."""
    return any(parquet_files(folder) for folder in (path, *(subfolders(path) if path.is_dir() else ())))


def check_is_not_saved_to_disk(path: Path) -> None:
    """Raise UserError for a folder of save_to_disk of Hugging Face datasets: Arrow files, not Parquet."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        raise UserError(
            f"{path} was made by save_to_disk of Hugging Face datasets; write Parquet files with "
            "load_from_disk(...)['train'].to_parquet('train.parquet'), and so test, and give parquet:FOLDER"
        )
