"""Names of splits: which folder or file names mean train, validation and test."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from fbpc_ray.core.errors import UserError

SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
"""Usual name (lower case) -> the split that it means."""

SYNONYMS = {
    "training": "train", "testing": "test", "eval": "test", "evaluation": "test", "dev": "validation",
    "development": "validation",
}  # fmt: skip
"""Other word -> the split that it means; a usual name beside it goes first."""

FILLERS = {
    "set", "sets", "split", "splits", "image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo",
    "photos", "data", "dataset", "folder", "folders", "dir", "seg", "samples", "files",
}  # fmt: skip
"""Words that say nothing about the split: train_images and training-set are train."""

WORDS = SPLITS | SYNONYMS
JOINED = re.compile(rf"({'|'.join(sorted(WORDS, key=len, reverse=True))})({'|'.join(FILLERS)})")


class SplitName(NamedTuple):
    """A name that holds the word of one split."""

    split: str
    usual: bool
    """Whether it is a key of SPLITS."""
    rest: tuple[str, ...]
    """The words that neither name a split nor are fillers: ('noisy',) of train_noisy."""


def parse(name: str) -> SplitName | None:
    """Return the split that `name` means, or None where it holds no word of a split, or those of several."""
    if usual := SPLITS.get(name.lower()):
        return SplitName(usual, True, ())
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    tokens = []
    for token in re.findall(r"[^\W\d_]+|\d+|[^\w\s.-]+", spaced):
        joined = JOINED.fullmatch(token)
        tokens += joined.groups() if joined else [token]
    splits = {WORDS[token] for token in tokens if token in WORDS}
    if len(splits) != 1:
        return None
    rest = tuple(token for token in tokens if token not in WORDS and token not in FILLERS)
    return SplitName(splits.pop(), False, rest)


def choose(names: Iterable[str], origin: object) -> dict[str, str]:
    """Map each split to its name among `names`, {} where none names a split; train may be missing.

    Names without other words go first (train before train_noisy), then usual names (val before dev). Other words are
    accepted where every split has the same ones (mnist_train, mnist_test). Raises UserError where two names tie.
    """
    groups: dict[tuple[str, ...], dict[str, SplitName]] = {(): {}}
    for name in names:
        if split_name := parse(name):
            groups.setdefault(split_name.rest, {})[name] = split_name
    group = groups[()]
    if all(split_name.split != "train" for split_name in group.values()):
        sets = [each for each in groups.values() if {"train"} < {split_name.split for split_name in each.values()}]
        if len(sets) > 1:
            both = ", ".join(sorted(name for each in sets for name in each))
            raise UserError(f"{origin}: {both} are splits of several data sets; keep those of one")
        group = sets[0] if sets else group
    chosen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        same = sorted((not split_name.usual, name) for name, split_name in group.items() if split_name.split == split)
        if len(same) > 1 and same[0][0] == same[1][0]:
            raise UserError(f"{origin}: {same[0][1]} and {same[1][1]} are both the {split} split; keep one")
        if same:
            chosen[split] = same[0][1]
    return chosen


def describe(chosen: dict[str, str], left_out: Iterable[str], origin: object) -> tuple[str, ...]:
    """List notes on the split of each name; none if all names are usual and none is left out."""
    left_out, notes = sorted(left_out), []
    if left_out or not all(name.lower() in SPLITS for name in chosen.values()):
        choices = ", ".join(f"{name} as the {split} split" for split, name in chosen.items())
        notes.append(f"{origin}: read {choices}" + (f"; left out {listed(left_out)}" if left_out else ""))
    return tuple(notes)


def listed(names: Iterable[object], count: int = 5) -> str:
    """Join the first few names for a message."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "") or "nothing"
