"""One reader per kind of image data. A reader turns files into a `Source`: whole arrays, and the place of each image.

Readers check what only they can see (bytes, columns, folders, files that belong together), naming the file and row.
What holds for every source (label range, empty classes, sizes, missing splits) is in datasets.py.
"""

import json
import os
import re
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fbpc_ray.errors import UserError, closest

SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
"""Name of a folder, or first word of a parquet file's name (lower case) -> the split that it holds."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
"""What PIL may take a file for, whatever its name: it would run Ghostscript, a program of its own, on PostScript."""
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
NPZ_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels")),
    "validation": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


class Part(NamedTuple):
    """One split as it lies in the files."""

    images: np.ndarray
    """(n, c, h, w) uint8, C-contiguous, n >= 1."""
    labels: np.ndarray
    """(n,) int64, not yet checked against the classes."""
    place: Callable[[int], str]
    """Index of an image -> where it comes from, for messages: 'train-0.parquet, row 7'."""


class Source(NamedTuple):
    """All that a reader found."""

    origin: str
    """Path or name, for messages."""
    classes: tuple[str, ...] | None
    """Class names in label order; None when the source names none."""
    parts: dict[str, Part]
    """'train' always; 'validation' and 'test' where the source has them."""
    notes: tuple[str, ...] = ()


def read(name: str, root: Path, download: bool) -> Source:
    """The data that `name` stands for, see NAMED and AT_PATH. Raises UserError for all that is wrong with the input."""
    kind, _, path = name.partition(":")
    try:
        if name in NAMED:
            return NAMED[name](root, download)
        if kind in AT_PATH and path:
            if not (at := Path(path).expanduser()).exists():
                raise UserError(f"{at} does not exist; check the path after {kind}:")
            return AT_PATH[kind](at)
    except OSError as error:
        raise UserError(f"{name}: cannot read the data: {_line(error)}") from error
    if kind in AT_PATH:
        raise UserError(f"data {name!r} lacks its path; write {kind}:PATH")
    if (at := Path(name).expanduser()).exists():
        ends = {".npz": "npz", ".parquet": "parquet"}
        kind = ends.get(at.suffix) or ("parquet" if any(at.rglob("*.parquet")) else "folder")
        raise UserError(f"data {name!r} is a path: say of what, e.g. {kind}:{name}")
    raise UserError(f"unknown data {name!r}; {closest(name, [*NAMED, *(f'{kind}:PATH' for kind in AT_PATH)])}")


# ---- named data


def digits(root: Path, download: bool) -> Source:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8), 0..16 scaled to 0..255; every fifth one is for the test."""
    del root, download  # they come with scikit-learn, whose import, with pandas and scipy, takes seconds
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("digits come with scikit-learn, which is not installed: pip install scikit-learn")
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    parts = {
        name: Part(images[rows], labels[rows], "row {}".format) for name, rows in (("train", ~test), ("test", test))
    }
    return Source("digits", tuple(map(str, range(10))), parts)


def cifar(kind: str, root: Path, download: bool) -> Source:
    """`kind` CIFAR10 or CIFAR100 (fine labels) from torchvision's root, (3, 32, 32)."""
    import torchvision.datasets

    reader: Any = getattr(torchvision.datasets, kind)
    try:
        splits = {"train": reader(root, train=True, download=download), "test": reader(root, train=False)}
    except (OSError, RuntimeError, EOFError, TarError, HTTPException) as error:
        if download:
            raise UserError(
                f"cannot download {kind.lower()} to {root} ({_line(error)}); check the connection"
            ) from error
        raise UserError(
            f"no whole {kind.lower()} in {root}: fetch it with --download, or name its folder with --data-root"
        ) from error
    parts = {
        split: Part(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.array(data.targets), "row {}".format)
        for split, data in splits.items()
    }
    return Source(kind.lower(), tuple(splits["train"].classes), parts)


def tiny_imagenet(root: Path, download: bool) -> Source:
    """Tiny-ImageNet as its zip file unpacks, in root/tiny-imagenet-200 or root itself; its test split has no labels."""
    del download  # not offered: one UserError says where to get it
    base = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (base / "train").is_dir():
        raise UserError(
            f"no tiny-imagenet in {root}: unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there, "
            "or name the folder that holds tiny-imagenet-200 with --data-root"
        )
    listed = base / "wnids.txt"
    wnids = (
        sorted(listed.read_text("utf-8", "replace").split())
        if listed.is_file()
        else [f.name for f in _subfolders(base / "train")]
    )
    parts = {"train": _class_folders(base / "train", wnids)}
    annotations = base / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing, so the validation images have no labels; unpack the zip file again")
    files, labels = [], []
    for number, text in enumerate(annotations.read_text("utf-8", "replace").splitlines(), start=1):
        file, wnid, *_ = [*text.split("\t"), ""]
        if wnid not in wnids:
            raise UserError(f"{annotations}, line {number}: class {wnid!r} is none of those in {base / 'train'}")
        files.append(base / "val" / "images" / file)
        labels.append(wnids.index(wnid))
    parts["validation"] = _files(annotations.parent, files, labels)
    return Source(str(base), tuple(wnids), parts)


# ---- data at a path


def parquet(path: Path) -> Source:
    """Parquet in Hugging Face layout: PATH or PATH/data with train-*, test-*, valid-* files, or one file.

    Column `img` or `image` (bytes of a file, or a struct with `bytes`) and integer column `label` or `fine_label`.
    """
    shards, notes = _shards(path)
    heads = {split: [_head(file) for file in files] for split, files in shards.items()}
    named = [(head.file, head.classes) for each in heads.values() for head in each if head.classes]
    for file, classes in named[1:]:
        if classes != named[0][1]:
            raise UserError(f"{named[0][0]} and {file} name different classes: their labels don't mean the same")
    parts = {split: _parquet_part(each) for split, each in heads.items()}
    return Source(str(path), named[0][1] if named else None, parts, notes)


def folder(path: Path) -> Source:
    """Class folders of image files, in PATH/train and PATH/test (or val, valid, validation), or in PATH itself."""
    folders: dict[str, Path] = {}
    for child in _subfolders(path):
        split = SPLITS.get(child.name.lower())
        if split in folders:
            raise UserError(f"{folders[split]} and {child} are both the {split} split; keep one")
        if split:
            folders[split] = child
    folders = folders or {"train": path}
    if "train" not in folders:
        raise UserError(f"no train split in {path}: it has {_listed(_subfolders(path))}; add {path / 'train'}")
    classes = [child.name for child in _subfolders(folders["train"])]
    if not classes:
        raise UserError(f"no class folders in {folders['train']}; put the images in one folder per class")
    return Source(str(path), tuple(classes), {split: _class_folders(at, classes) for split, at in folders.items()})


def npz(path: Path) -> Source:
    """Arrays of one NumPy file, see NPZ_KEYS; images NHWC, NCHW or NHW, integers 0..255 or floats in [0, 1]."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("one array, not an archive")
            pairs = {split: next((p for p in known if p[0] in archive), None) for split, known in NPZ_KEYS.items()}
            missing = [key for pair in pairs.values() if pair for key in pair if key not in archive]
            if not pairs["train"] or missing:
                raise UserError(
                    f"{path}: no array {', '.join(missing) or 'x_train'} (found {', '.join(archive.files) or 'none'}); "
                    "save x_train, y_train, x_test, y_test with numpy.savez"
                )
            found = {split: (pair, archive[pair[0]], archive[pair[1]]) for split, pair in pairs.items() if pair}
    except (OSError, ValueError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable npz file of plain arrays ({_line(error)})") from error
    return Source(str(path), None, {split: arrays(str(path), *each) for split, each in found.items()})


NAMED: dict[str, Callable[[Path, bool], Source]] = {
    "digits": digits,
    "cifar10": partial(cifar, "CIFAR10"),
    "cifar100": partial(cifar, "CIFAR100"),
    "tiny-imagenet": tiny_imagenet,
}
"""Name -> reader(root, download)."""

AT_PATH: dict[str, Callable[[Path], Source]] = {"parquet": parquet, "folder": folder, "npz": npz}
"""Kind, as in kind:PATH -> reader(path)."""


# ---- images


def _decode(files: Iterable[bytes | None], count: int, place: Callable[[int], str]) -> np.ndarray:
    """`count` encoded images -> (count, 3, h, w) uint8; all of one size, grey ones turned to RGB."""
    images = np.empty((0, 3, 0, 0), np.uint8)
    for index, data in enumerate(files):
        try:
            pixels = _rgb(data)
        except Exception as error:  # a decoder fails in any way on damaged bytes
            raise UserError(f"{place(index)}: not a readable image ({_line(error)}); mend or remove it") from error
        if index == 0:
            images = np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise UserError(
                f"{place(index)}: the image is {size(pixels)}, the first one ({place(0)}) is {size(images)}; "
                "all images must have one size; docs/faq.md says how to resize them"
            )
        images[index] = pixels
    return images


def _rgb(data: bytes | None) -> np.ndarray:
    """One encoded image -> (3, h, w) uint8. PIL in one thread takes 0.08 ms for 32x32; threads don't help."""
    if data is None:
        raise ValueError("no image bytes")
    with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode}, only 8 bits a channel are supported")
        if image.mode == "P":  # a palette may hold transparency, which only RGBA takes without a warning
            image = image.convert("RGBA")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)


def size(images: np.ndarray) -> str:
    """'32x32' (width x height), with the channels where they aren't three."""
    channels, height, width = images.shape[-3:]
    return f"{width}x{height}" + (f" with {channels} channel(s)" if channels != 3 else "")


# ---- image files in folders


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _class_folders(path: Path, classes: list[str]) -> Part:
    """path/<class>/**/<image file>, sorted by path; the label is the class's index in `classes`."""
    unknown = [child.name for child in _subfolders(path) if child.name not in classes]
    if unknown:
        raise UserError(f"{path / unknown[0]}: none of the classes ({_listed(classes)}); rename or remove the folder")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            Path(base, file)
            for base, _, names in os.walk(path / name, followlinks=True)
            for file in names
            if Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith(".")
        )
        files += found
        labels += [label] * len(found)
    return _files(path, files, labels)


def _files(path: Path, files: list[Path], labels: list[int]) -> Part:
    if not files:
        raise UserError(f"no image in {path}")

    def place(index: int) -> str:
        return str(files[index])

    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise UserError(f"{missing} is missing; restore it")
    images = _decode((file.read_bytes() for file in files), len(files), place)
    return Part(images, np.array(labels, np.int64), place)


# ---- parquet


class _Head(NamedTuple):
    """What one parquet file says of itself."""

    file: Path
    rows: int
    image: str
    label: str
    classes: tuple[str, ...] | None


def _shards(path: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Split -> its files in the order of their numbers, and notes on files of no split."""
    if path.is_file():
        return {"train": [path]}, ()
    files = list(path.glob("*.parquet")) or list(path.glob("data/*.parquet"))
    if not files:
        raise UserError(f"no .parquet file in {path} or {path / 'data'}; name the folder that holds them")
    shards: dict[str, list[Path]] = {}
    other = []
    for file in sorted(files, key=_natural):
        word = re.match(r"[a-z]*", file.name.lower())
        split = SPLITS.get(word.group() if word else "")
        if split:
            shards.setdefault(split, []).append(file)
        else:
            other.append(file)
    if "train" not in shards:
        raise UserError(f"no train split in {path}: it has {_listed(sorted(files))}; name its files train*.parquet")
    for each in shards.values():
        _whole(each)
    shards = {split: shards[split] for split in ("train", "validation", "test") if split in shards}
    return shards, (f"left out {_listed(other)} in {path}: no name of a split",) if other else ()


def _whole(files: list[Path]) -> None:
    """Refuse a half downloaded split: 'train-00000-of-00003.parquet' asks for two more files."""
    counts = {match.group(1) for file in files if (match := re.search(r"-of-([0-9]+)\.parquet$", file.name))}
    for count in counts:
        found = [file for file in files if file.name.endswith(f"-of-{count}.parquet")]
        if len(found) != int(count):
            raise UserError(
                f"{files[0].parent} holds {len(found)} of {int(count)} files like {found[0].name}; "
                f"fetch the others, or rename without '-of-{count}' to use a part"
            )


def _natural(file: Path) -> list[str | int]:
    """Sorts train-2 before train-10: text and numbers take turns."""
    return [int(text) if turn % 2 else text for turn, text in enumerate(re.split(r"([0-9]+)", file.name))]


def _head(file: Path) -> _Head:
    try:
        with pq.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({_line(error)}); fetch it again") from error
    image, label = (
        next((name for name in names if name in schema.names), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS)
    )
    if image is None or label is None:
        lacks = IMAGE_COLUMNS if image is None else LABEL_COLUMNS
        raise UserError(f"{file}: no column {' or '.join(lacks)} (found {', '.join(schema.names)}); rename it")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{file}: column {image} is {kind}; it must hold the bytes of image files, or a struct of them")
    if not pa.types.is_integer(schema.field(label).type):
        raise UserError(f"{file}: column {label} is {schema.field(label).type}; it must hold integers from 0")
    return _Head(file, rows, image, label, _class_names(file, schema, label))


def _class_names(file: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    """ClassLabel names in the schema's `huggingface` metadata, a list or {"0": name}; None where it has none."""
    try:
        feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][label]
        names = feature.get("names", feature.get("class_label", {}).get("names"))
        if isinstance(names, dict):
            if sorted(map(int, names)) != list(range(len(names))):
                raise ValueError("its class names aren't numbered from 0 without gaps")
            names = [names[key] for key in sorted(names, key=int)]
        return tuple(map(str, names)) if names else None
    except KeyError:
        return None
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: its huggingface metadata is damaged ({_line(error)}); write it again") from error


def _parquet_part(heads: list[_Head]) -> Part:
    ends = list(accumulate(head.rows for head in heads))
    if not ends[-1]:
        raise UserError(f"no row in {heads[0].file}")

    def place(index: int) -> str:
        shard = bisect_right(ends, index)
        return f"{heads[shard].file}, row {index - ends[shard] + heads[shard].rows}"

    labels = np.concatenate([_labels(head) for head in heads])
    images = _decode((data for head in heads for data in _blobs(head)), ends[-1], place)
    return Part(images, labels, place)


def _labels(head: _Head) -> np.ndarray:
    try:
        with pq.ParquetFile(head.file) as opened:
            column = opened.read(columns=[head.label]).column(0)
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{head.file}, row {row}: column {head.label} is null; every row needs a label")
        return column.cast(pa.int64()).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{head.file}: cannot read column {head.label} ({_line(error)})") from error


def _blobs(head: _Head) -> Iterator[bytes | None]:
    try:
        with pq.ParquetFile(head.file) as opened:
            for batch in opened.iter_batches(batch_size=1024, columns=[head.image]):
                column = batch.column(0)
                if pa.types.is_struct(column.type):
                    column = column.flatten()[column.type.get_field_index("bytes")]
                yield from column.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{head.file}: cannot read column {head.image} ({_line(error)}); fetch it again") from error


# ---- arrays


def arrays(
    origin: str, keys: tuple[str, str], images: np.ndarray, labels: np.ndarray, channels_first: bool = False
) -> Part:
    """A split from arrays that `origin` calls by the names `keys`; images as for `npz`, or known to be NCHW or NHW."""
    if images.ndim not in (3, 4):
        raise UserError(f"{origin}: {keys[0]} has shape {images.shape}; it must be NHWC, NCHW or NHW")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{origin}: {keys[1]} is {labels.dtype} {labels.shape}; it must be integers, one per image")
    if len(images) != len(labels) or not len(labels):
        raise UserError(
            f"{origin}: {keys[0]} has {len(images)} images, {keys[1]} {len(labels)} labels; they must agree"
        )
    where = f"{origin}: {keys[0]}"
    return Part(
        _channels_first(_bytes(images, where), where, channels_first),
        labels.astype(np.int64),
        lambda index: f"{origin}, {keys[1]}[{index}]",
    )


def _bytes(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    floating = np.issubdtype(images.dtype, np.floating)
    top = 1 if floating else 255
    if not (floating or np.issubdtype(images.dtype, np.integer)) or not images.size:
        raise UserError(f"{where} is {images.dtype} {images.shape}; save uint8, or floats in [0, 1]")
    if not (images.min() >= 0 and images.max() <= top):  # also true for NaN
        raise UserError(f"{where} holds values outside 0..{top} ({images.dtype}); save uint8, or floats in [0, 1]")
    return np.rint(images * 255.0).astype(np.uint8) if floating else images.astype(np.uint8)


def _channels_first(images: np.ndarray, where: str, known: bool) -> np.ndarray:
    if images.ndim == 3 or known:
        return np.ascontiguousarray(images[:, None] if images.ndim == 3 else images)
    last, first = (images.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first or not images.size:
        why = "could be NHWC and NCHW" if last else "is not NHWC, NCHW (1 or 3 channels) or NHW"
        raise UserError(f"{where} of shape {images.shape} {why}; save it as NHW, or with 1 or 3 channels")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if last else images)


# ---- messages


def _line(error: Exception) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _listed(names: Iterable[Path | str]) -> str:
    """The first few names, for messages."""
    names = [name.name if isinstance(name, Path) else name for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
