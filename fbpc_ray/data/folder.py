"""Read class folders of image files: which folders are splits, and which are classes."""

import unicodedata
from pathlib import Path

from fbpc_ray.core.errors import UserError
from fbpc_ray.data.raw import RawDataset, RawSplit
from fbpc_ray.data.resize import UNCHANGED, Resizing
from fbpc_ray.data.shards import check_is_not_saved_to_disk, has_parquet
from fbpc_ray.data.splits import choose, describe, listed, parse
from fbpc_ray.data.walk import Walk, by_class, loose_files, read_files, subfolders, walk

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


def folder(path: Path, resizing: Resizing = UNCHANGED) -> RawDataset:
    """Read class folders of image files, in PATH/train and PATH/test (or val, training, ...), or in PATH itself."""
    _check_root(path)
    splits, notes = split_folders(path)
    if splits and "train" not in splits:
        raise UserError(f"no train split in {path}: it has {listed(splits.values())}; add {path / 'train'}")
    at = {split: _unwrap(path / name, split) for split, name in splits.items()} or {"train": path}
    classes = tuple(child.name for child in subfolders(at["train"]))
    _check_classes(at["train"], classes)
    walks = {split: walk(place, by_class(place, classes)) for split, place in at.items()}
    _check_read(at["train"], classes, walks["train"])
    parts = {split: _read(at[split], walks[split], resizing) for split in at}
    return RawDataset(str(path), classes, parts, (*notes, *_shared_files(walks)))


def split_folders(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find the folders in `path` that are splits: they hold class folders and have the name of a split.

    Returns:
        {split: folder name}, or {} if the folders of `path` are the classes; and notes on how folders were read.
    """
    names = [child.name for child in subfolders(path)]
    parsed = {name: parts for name in names if (parts := parse(name))}
    flat = [name for name in parsed if not subfolders(path / name)]
    plain = [name for name in flat if not parsed[name].rest]
    chosen = choose([name for name in names if name not in flat], path)
    if "train" not in chosen:
        splits = {parsed[name].split for name in plain}
        if "train" in splits and (len(splits) > 1 or len(plain) == len(names)):
            raise UserError(f"no class folders in {path / 'train'}; put the images in one folder per class")
        if all(parsed[name].rest for name in chosen.values()):
            chosen = {}
    if not chosen:
        note = f"{path}: read {listed(plain)} as a class, not as a split, because it holds no class folders"
        return {}, (note,) if plain else ()
    left_out = [name for name in names if name not in chosen.values() and name not in flat]
    notes = describe(chosen, left_out, path)
    unlabelled = [f"{name} ({len(loose_files(path / name))} images)" for name in flat]
    if unlabelled:
        notes += (f"{path}: left out {listed(unlabelled)}: no class folders, so no labels",)
    return chosen, notes


def _check_root(path: Path) -> None:
    if not path.is_dir():
        unpack = ", after unpacking it" if path.suffix.lower() in ARCHIVES else ""
        raise UserError(f"{path} is not a folder; give the folder that holds train and test{unpack}")
    if path.resolve() == Path(path.resolve().anchor):
        raise UserError(f"{path} is the root of the file system; give the folder that holds train and test")
    check_is_not_saved_to_disk(path)


def _unwrap(path: Path, split: str) -> Path:
    """Go down from seg_train to seg_train/seg_train: a folder that holds only one folder of its split."""
    for _ in range(4):
        inner = subfolders(path)
        name = parse(inner[0].name) if len(inner) == 1 else None
        if not name or name.split != split or loose_files(path) or not subfolders(inner[0]):
            break
        path = inner[0]
    return path


def _check_classes(path: Path, classes: tuple[str, ...]) -> None:
    """Refuse a folder whose subfolders can't be classes."""
    if not classes:
        if has_parquet(path):
            raise UserError(f"{path} holds Parquet files, not folders of images; give parquet:{path}")
        loose = len(loose_files(path))
        images = f" ({loose} image{'s' if loose > 1 else ''} in no folder)" if loose else ""
        raise UserError(f"no class folders in {path}{images}; put the images in one folder per class")
    same = {unicodedata.normalize("NFC", name) for name in classes}
    if len(same) < len(classes):
        raise UserError(f"{path}: two class folders differ only in Unicode form (NFC, NFD); merge them")
    for name in classes:
        parsed = {child.name: parts for child in subfolders(path / name) if (parts := parse(child.name))}
        splits = {inner: parts.split for inner, parts in parsed.items() if not parts.rest}
        if any(subfolders(path / name / inner) for inner in splits):
            if "train" in split_folders(path / name)[0]:
                raise UserError(f"{path / name} holds splits of its own; give folder:{path / name}")
        elif len(set(splits.values())) > 1:
            raise UserError(
                f"{path / name} holds the folders {listed(splits)}: splits within a class; move them to "
                f"{path / next(iter(splits)) / name} and so on"
            )
    inner = subfolders(path / classes[0])
    if len(classes) == 1 and len(inner) > 1:
        raise UserError(
            f"{path} has 1 class, {classes[0]}, which holds {listed(child.name for child in inner)}; "
            f"if these are the classes, give folder:{path / classes[0]}"
        )


def _check_read(path: Path, classes: tuple[str, ...], train: Walk) -> None:
    """Raise UserError for a class none of whose files has a suffix that is read."""
    present = set(train.labels)
    for label, name in enumerate(classes):
        suffixes = sorted(suffix or "no suffix" for suffix, folder_name in train.unread if folder_name == name)
        if label not in present and suffixes == [".parquet"]:
            raise UserError(f"{path / name} holds Parquet files, not images; give parquet:{path}")
        if label not in present and suffixes:
            raise UserError(
                f"class {name!r} (label {label}) of {path} has no train image: its files have {listed(suffixes)}, "
                "not read as images; convert them to PNG"
            )


def _read(path: Path, listing: Walk, resizing: Resizing) -> RawSplit:
    split = read_files(path, listing.files, listing.labels, listing.notes(path), resizing)
    loose = loose_files(path)
    if loose:
        count = f"{len(loose)} image{'s' if len(loose) > 1 else ''}"
        note = f"{path}: left out {count} in no class folder ({listed(file.name for file in loose)})"
        split = split._replace(notes=(*split.notes, note))
    return split


def _shared_files(walks: dict[str, Walk]) -> tuple[str, ...]:
    """List notes on files that are in train and, by a link, in another split."""
    train = walks["train"].real
    return tuple(
        f"{count} images of the {split} split are the same files as train images; remove them from one"
        for split, listing in walks.items()
        if split != "train" and (count := len(listing.real & train))
    )
