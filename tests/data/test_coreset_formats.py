"""What is exported is read by others, and here, to the bit; what others made is read, and no file runs code."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from support.runs import distil, flags, refused
from support.traps import Trap

from fbpc_ray.commands import export as exports
from fbpc_ray.commands import main
from fbpc_ray.core.config import Config, read_config
from fbpc_ray.core.errors import UserError
from fbpc_ray.core.rng import generator
from fbpc_ray.data import coreset, coreset_formats, coreset_reader
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.data.datasets import Dataset, Split, denormalise, normalise
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.reporting import dataset_card

EXACT = ("hf", "safetensors", "pt", "npz")
NAMES = ("cat", "Hündin / wild", 'a "b": c')


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """Two steps on digits, evaluated by short chains."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    distil(*flags(small, backend="serial", steps=2, ipc=2, out=str(folder)))
    return folder


@pytest.fixture(scope="module")
def colour() -> Dataset:
    """Three classes of 5x4 pixels in colour."""
    images = np.zeros((9, 3, 5, 4), np.uint8)
    split = Split(images, np.arange(9) % 3)
    return Dataset("mine", NAMES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), split, split, split, (), "")


@pytest.fixture(scope="module")
def made() -> Coreset:
    """Of another normalisation than the data set's, beyond 0..1, and not in the order of the labels."""
    images = 2 * torch.randn(6, 3, 5, 4, generator=generator(0, "images"))
    return Coreset(images, torch.arange(6) % 3, (1 / 3, 0.1, 0.2), (0.25, 0.3, 0.1), NAMES)


def exported(found: Coreset, kind: str, out: Path) -> Path:
    coreset_formats.write(coreset_formats.files(found, kind, {"method": "fbpc"}, "card"), out)
    return out


def suffixed(folder: Path, kind: str) -> Path:
    return folder / f"it{coreset_formats.SINGLE.get(kind, '')}"


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("name", ["mine", "mine.v2"])
def test_a_file_without_a_known_suffix_is_read_by_its_content(made, colour, kind, name, tmp_path):
    outcome = coreset_reader.load(exported(made, kind, tmp_path / name), colour)
    assert torch.equal(outcome.coreset.images, made.images) and torch.equal(outcome.coreset.labels, made.labels)


def test_a_file_of_unknown_content_and_suffix_is_refused(colour, tmp_path):
    for content in (b"", b"text", b"PK\x03\x04", b"{}"):
        (tmp_path / "mine").write_bytes(content)
        with pytest.raises(UserError, match="coreset"):
            coreset_reader.load(tmp_path / "mine", colour)


def same(one: Coreset, other: Coreset) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and one[2:6] == other[2:6]


def evaluated(source: Path, config: Config, json_path: Path, *words: str) -> dict:
    e, n = config.evaluation, config.networks
    main.main([
        "evaluate", "--coreset", str(source), "--data", "digits", "--backend", "serial", "--architectures",
        *n.architectures, "--width", str(n.width), "--num-chains", str(e.num_chains), "--chain-epochs",
        str(e.chain_epochs), "--chain-every", str(e.chain_every), "--threads", "1", "--json", str(json_path), *words,
    ])  # fmt: skip
    return json.loads(json_path.read_text())


# ---- away and back


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_exported_scores_the_same_to_the_bit(run, small, kind, tmp_path, capsys):
    """Under the path that is printed, whatever --out lacks of a suffix."""
    out = suffixed(tmp_path, kind)
    main.main(["export", str(run), "--format", kind, "--out", str(tmp_path / "it")])
    assert capsys.readouterr().out == f"export: {out}\n"
    for source in (out, run):
        assert same(coreset_reader.load(source, _digits()).coreset, coreset.load(RunDirectory(run).coreset_path))
    before = json.loads(RunDirectory(run).result_path.read_text())["coresets"]
    after = evaluated(out, small, tmp_path / "result.json")
    assert after["coresets"] == {"random": before["random"], "given": before["fbpc"]}
    assert before["random"] != before["fbpc"]
    assert (after["ipc"], after["images"], after["coreset"]) == (2, 20, str(out))


@pytest.mark.parametrize("kind", coreset_formats.FORMATS)
@pytest.mark.parametrize("name", ["", "it", "it.v2", "own"])
def test_every_format_is_read_under_the_path_that_export_prints(run, small, kind, name, tmp_path, capsys, monkeypatch):
    """By default, without a suffix, with a dot, and with the format's own name as suffix; png is rounded to 8 bits."""
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    out = [] if not name else ["--out", str(tmp_path / (f"it.{kind}" if name == "own" else name))]
    main.main(["export", str(run), "--format", kind, *out])
    printed = Path(capsys.readouterr().out.splitlines()[0].removeprefix("export: "))
    assert printed.suffix == coreset_formats.SINGLE.get(kind, printed.suffix)
    assert printed.is_dir() is (kind not in coreset_formats.SINGLE)
    whole, outcome = coreset.load(RunDirectory(run).coreset_path), coreset_reader.load(printed, _digits())
    assert outcome.notes == ()
    if kind != "png":
        assert same(outcome.coreset, whole)
        return
    rounded = normalise(denormalise(whole.images, whole.mean, whole.std), whole.mean, whole.std)
    assert same(outcome.coreset, whole._replace(images=rounded))
    if name == "it":  # the others are evaluated by the test above
        assert evaluated(printed, small, tmp_path / "result.json")["images"] == 20


@pytest.mark.parametrize(
    ("kind", "name"), [("npz", "x.safetensors"), ("hf", "x.npz"), ("pt", "x.png"), ("png", "x.pt")]
)
def test_the_suffix_of_another_format_is_refused(run, kind, name, tmp_path, capsys):
    text = refused(capsys, str(run), "--format", kind, "--out", str(tmp_path / name), command="export")
    assert f"--out {name}: --format {kind} is " in text
    assert not (tmp_path / name).exists()


def _digits() -> Dataset:
    from fbpc_ray.data.datasets import load

    return load("digits")


def test_a_coreset_is_judged_by_its_own_normalisation(small, tmp_path):
    """Of a run with a validation split, whose constants are those of the other images."""
    folder, out = tmp_path / "run", tmp_path / "pair"
    distil(*flags(small, backend="serial", method="random", validation=0.3, seed=3, out=str(folder)))
    main.main(["export", str(folder), "--format", "pt", "--out", str(out)])
    before = json.loads(RunDirectory(folder).result_path.read_text())["coresets"]["random"]
    assert evaluated(out, small, tmp_path / "own.json")["coresets"]["given"] == before
    (out / coreset_formats.SIDECAR).unlink()
    assert evaluated(out, small, tmp_path / "other.json")["coresets"]["given"] != before
    again = evaluated(out, small, tmp_path / "told.json", "--validation", "0.3")
    assert again["coresets"]["given"] == before


@pytest.mark.parametrize("kind", EXACT)
def test_colours_names_and_normalisation_come_back(made, colour, kind, tmp_path):
    outcome = coreset_reader.load(exported(made, kind, suffixed(tmp_path, kind)), colour)
    assert same(outcome.coreset, made)
    assert outcome.notes == ()


@pytest.mark.parametrize("grey", [False, True])
def test_png_is_the_8_bit_picture(made, colour, grey, tmp_path):
    """Read back, it is what the rounded pixels are, class by class; exported again, nothing changes."""
    if grey:
        made = made._replace(images=made.images[:, :1].contiguous(), mean=made.mean[:1], std=made.std[:1])
        train = Split(colour.train.images[:, :1].copy(), colour.train.labels)
        colour = colour._replace(train=train, mean=(0.5,), std=(0.2,))
    outcome = coreset_reader.load(exported(made, "png", tmp_path / "one"), colour).coreset
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    rounded = normalise(denormalise(made.images, made.mean, made.std), made.mean, made.std)
    assert same(outcome, made._replace(images=rounded[order], labels=made.labels[order]))
    assert not torch.equal(rounded, made.images)
    assert same(coreset_reader.load(exported(outcome, "png", tmp_path / "two"), colour).coreset, outcome)


@pytest.mark.parametrize("channels", [3, 1])
def test_datasets_reads_the_folder(made, colour, channels, tmp_path, monkeypatch):
    """The real library: exact pixels, pictures, names; and what it writes is read here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    datasets.disable_progress_bars()
    made = made._replace(
        images=made.images[:, :channels].contiguous(), mean=made.mean[:channels], std=made.std[:channels]
    )
    card = dataset_card.card(made, "hf", Config(), {"method": "fbpc", "data": "cifar10"}, None)
    out = tmp_path / "set"
    coreset_formats.write(coreset_formats.files(made, "hf", {}, card), out)
    dataset = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset, datasets.Dataset)
    assert dataset.features["label"].names == list(NAMES)
    assert dataset.features["pixels"] == datasets.Array3D((channels, 5, 4), "float32")
    tensors = dataset.with_format("torch")[:]
    assert torch.equal(tensors["pixels"], made.images)
    assert torch.equal(tensors["label"], made.labels)
    picture = np.array(dataset[4]["image"]).reshape(5, 4, channels).transpose(2, 0, 1)
    assert np.array_equal(picture, denormalise(made.images, made.mean, made.std)[4].numpy())

    dataset.to_parquet(tmp_path / "theirs.parquet")
    facts = {"mean": made.mean, "std": made.std, "classes": NAMES}
    (tmp_path / coreset_formats.SIDECAR).write_text(json.dumps(facts))
    train = Split(colour.train.images[:, :channels].copy(), colour.train.labels)
    fitting = colour._replace(train=train)
    assert same(coreset_reader.load(tmp_path / "theirs.parquet", fitting).coreset, made)
    dataset.select_columns(["image", "label"]).to_parquet(tmp_path / "theirs.parquet")
    (tmp_path / coreset_formats.SIDECAR).unlink()
    fitting = fitting._replace(mean=colour.mean[:channels], std=colour.std[:channels])
    pixels = denormalise(made.images, made.mean, made.std)
    again = coreset_reader.load(tmp_path / "theirs.parquet", fitting).coreset
    assert torch.equal(again.images, normalise(pixels, fitting.mean, fitting.std))
    with pytest.raises(UserError, match="other classes"):
        coreset_reader.load(tmp_path / "theirs.parquet", fitting._replace(classes=("x", "y", "z")))


def test_the_card_says_what_made_it_and_names_no_folder_of_this_machine(run, tmp_path):
    out = tmp_path / "set"
    main.main(["export", str(run), "--format", "hf", "--out", str(out)])
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == "cc-by-4.0"
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    outcome = coreset.load(RunDirectory(run).coreset_path)
    result = json.loads(RunDirectory(run).result_path.read_text())
    for word in (str(list(outcome.mean)), str(list(outcome.std)), "`fbpc`, step 2", result["commit"], '"gamma": 0.5',
                 f"torch {result['versions']['torch']}", "UCI", "convnet-bn"):  # fmt: skip
        assert word in text
    settings = read_config(run).updated(data=f"folder:{tmp_path}/cats")
    facts = {"data": exports._short(settings.data.data)}
    theirs = dataset_card.card(outcome, "pt", settings, facts, result)
    assert "folder:cats" in theirs
    for card in (text, theirs):
        assert str(tmp_path) not in card and str(run) not in card and settings.experts.experts not in card


@pytest.mark.parametrize(
    ("data", "licence", "words"),
    [
        ("digits", {"license": "cc-by-4.0"}, "CC BY 4.0"),
        ("cifar10", {"license": "unknown"}, "states no licence"),
        ("cifar100", {"license": "unknown"}, "states no licence"),
        (
            "tiny-imagenet",
            {"license": "other", "license_name": "imagenet", "license_link": "https://www.image-net.org/download.php"},
            "non-commercial research",
        ),
        ("folder:cats", {"license": "unknown"}, "Unknown: the licence"),
    ],
)
def test_the_card_says_whose_images_these_are_and_under_which_licence(run, data, licence, words):
    card = dataset_card.card(coreset.load(RunDirectory(run).coreset_path), "hf", read_config(run), {"data": data}, None)
    head = yaml.safe_load(card.split("---\n", 2)[1])
    assert {name: value for name, value in head.items() if name.startswith("license")} == licence
    assert words in card.split("## Licence of the source")[1]


@pytest.mark.parametrize("change", ["fewer images", "other classes", "another size"])
def test_a_coreset_of_another_run_is_not_exported(run, change, tmp_path, capsys):
    """Its file is whole, its config.json and its random.safetensors tell."""
    copy = RunDirectory(shutil.copytree(run, tmp_path / "run"))
    saved = coreset.load(copy.coreset_path)
    if change == "fewer images":
        saved = saved._replace(images=saved.images[:-1], labels=saved.labels[:-1])
    elif change == "other classes":
        saved = saved._replace(classes=("ant", *saved.classes[1:]))
    else:
        saved = saved._replace(images=saved.images[..., 1:])
    coreset.save(saved, copy.coreset_path)
    line = refused(capsys, str(copy.folder), "--format", "npz", "--out", str(tmp_path / "a.npz"), command="export")
    assert line.startswith(f"error: {copy.coreset_path}: expected ")


def test_names_in_the_card_are_text(run):
    """Classes, data and facts of somebody else's run: no markup, no line of their own."""
    hostile = "<script>alert(1)</script>\n# heading ```` [a](b)"
    saved = coreset.load(RunDirectory(run).coreset_path)
    saved = saved._replace(classes=(hostile, *saved.classes[1:]))
    facts = {"data": f"folder:{hostile}", "method": hostile, "step": hostile, "commit": hostile}
    result = RunDirectory(run).read_result()
    assert result is not None
    result |= {"device": hostile, "split": hostile, "versions": {hostile: hostile}}
    text = dataset_card.card(saved, "pt", read_config(run).updated(data=f"folder:{hostile}"), facts, result)
    blocks = text.split("```")
    assert len(blocks) % 2 == 1
    for line in "".join(blocks[::2]).splitlines():
        assert "<script>" not in re.sub("`[^`]*`", "", line)
        assert not line.startswith("# heading")


# ---- coresets of others


def theirs(kind: str, folder: Path, pixels: torch.Tensor, normal: torch.Tensor, labels: torch.Tensor) -> Path:
    """The same coreset as others write it."""
    archive, file = folder / "it.npz", folder / "it.pt"
    unit = pixels.double() / 255
    if kind == "mtt":
        torch.save(torch.nn.Parameter(normal), folder / "images_1000.pt")
        torch.save(labels.int(), folder / "labels_1000.pt")
        return folder / "images_1000.pt"
    if kind == "dc":
        torch.save({"data": [[normal + 1, labels], [normal, labels]], "accs_all_exps": {"ConvNet": [0.5]}}, file)
        return file
    if kind == "tuple":
        torch.save((normal, labels), file)
        return file
    if kind == "safetensors":
        save_file({"images": normal, "labels": labels}, folder / "it.safetensors", {"format": "pt"})
        return folder / "it.safetensors"
    if kind == "npz bytes":
        np.savez(archive, images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
        return archive
    if kind == "npz unit":
        np.savez(archive, images=unit.numpy(), labels=labels.numpy().astype(np.uint8))
        return archive
    exported(Coreset(normal, labels, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), NAMES), "png", folder / "png")
    (folder / "png" / coreset_formats.SIDECAR).unlink()
    for at, name in zip(sorted(f for f in (folder / "png").iterdir() if f.is_dir()), ("cat", "b", "c"), strict=True):
        at.rename(at.with_name(name))
    return folder / "png"


@pytest.mark.parametrize("kind", ["mtt", "dc", "tuple", "safetensors", "npz bytes", "npz unit", "folders"])
def test_what_others_made_is_read(colour, kind, tmp_path):
    """Tensors taken as they are, bytes normalised as the data set is, and a line that says what was assumed."""
    colour = colour._replace(classes=("cat", "b", "c"))
    pixels = torch.randint(0, 256, (3, 3, 5, 4), generator=generator(0, "pixels")).to(torch.uint8)
    normal, labels = normalise(pixels, colour.mean, colour.std), torch.arange(3)
    outcome = coreset_reader.load(theirs(kind, tmp_path, pixels, normal, labels), colour)
    assert torch.equal(outcome.coreset.images, normal)
    assert outcome.coreset.labels.tolist() == [0, 1, 2]
    assert outcome.coreset[2:6] == (colour.mean, colour.std, ("cat", "b", "c"), None)
    assert len(outcome.notes) == (0 if kind in ("npz bytes", "folders") else 1)
    if kind == "npz unit":
        assert "0..1" in outcome.notes[0]
        as_told = coreset_reader.load(tmp_path / "it.npz", colour, "normalised").coreset.images
        assert torch.equal(as_told, (pixels.double() / 255).float())
    elif outcome.notes:
        assert "normalised with mean [0.5, 0.4, 0.3]" in outcome.notes[0]
        with pytest.raises(UserError, match="--pixels unit"):
            coreset_reader.load(theirs(kind, tmp_path, pixels, normal, labels), colour, "unit")


# ---- bad files


def bytes_of(write) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def pair(images: object, labels: object) -> bytes:
    return bytes_of(lambda file: torch.save((images, labels), file))


def arrays(**named: np.ndarray) -> bytes:
    return bytes_of(lambda file: np.savez(file, allow_pickle=True, **named))


GOOD, LABELS = torch.zeros(3, 3, 5, 4) - 1, torch.arange(3)
BAD = {
    "trap.pt": (lambda trap: pair(GOOD, trap), "nothing in it was run"),
    "trap.npz": (lambda trap: arrays(images=np.array([trap], object), labels=LABELS.numpy()), "nothing in it was run"),
    "cut.pt": (lambda trap: pair(GOOD, LABELS)[:-200], "nothing in it was run"),
    "cut.npz": (lambda trap: arrays(images=GOOD.numpy(), labels=LABELS.numpy())[:-100], "nothing in it was run"),
    "empty.parquet": (lambda trap: b"", "nothing in it was run"),
    "text.safetensors": (lambda trap: b"hello", "nothing in it was run"),
    "number.pt": (lambda trap: bytes_of(lambda file: torch.save(3, file)), "nothing in it was run"),
    "alone.pt": (lambda trap: bytes_of(lambda file: torch.save(GOOD, file)), "labels_X.pt"),
    "images_1.pt": (lambda trap: bytes_of(lambda file: torch.save(GOOD, file)), "labels_1.pt: coreset not found"),
    "flags.pt": (lambda trap: pair(GOOD, torch.zeros(3, 3, dtype=torch.bool)), "must be class numbers"),
    "soft.pt": (lambda trap: pair(GOOD, torch.zeros(3, 2)), "soft labels are"),
    "four.pt": (lambda trap: pair(GOOD, LABELS + 1), "labels from 1 to 3, but 3 classes"),
    "fewer.pt": (lambda trap: pair(GOOD, LABELS[:2]), "expected int64"),
    "nan.pt": (lambda trap: pair(GOOD / 0, LABELS), "not finite"),
    "none.pt": (lambda trap: pair(GOOD[:0], LABELS[:0]), "is not a coreset"),
    "large.pt": (lambda trap: pair(torch.zeros(3, 3, 8, 8) - 1, LABELS), "--data"),
    "sparse.pt": (lambda trap: pair(GOOD.to_sparse(), LABELS), "plain tensor"),
    "integers.pt": (lambda trap: pair(GOOD.long(), LABELS), "uint8 or floats"),
    "names.npz": (lambda trap: arrays(x=GOOD.numpy()), "no array images"),
    "it.txt": (lambda trap: b"hello", ".safetensors, .npz, .pt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_runs_nothing(colour, name, tmp_path):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=reason) as caught:
        coreset_reader.load(tmp_path / name, colour)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_a_bad_folder_is_one_line(made, colour, tmp_path):
    (tmp_path / "empty").mkdir()
    folders = exported(made, "png", tmp_path / "png")
    damaged = exported(made, "pt", tmp_path / "pt")
    (damaged / coreset_formats.SIDECAR).write_text('{"mean": 3}')
    nothing = exported(made, "hf", tmp_path / "hf")
    (nothing / coreset_formats.SHARD).write_bytes(b"PAR1")
    (folders / coreset_formats.SIDECAR).unlink()
    for folder, reason in (
        (tmp_path / "missing", "coreset not found"), (tmp_path / "empty", "no class folders"),
        (folders, "is not a class of mine"), (damaged, "coreset.json is damaged"), (nothing, "is not a coreset"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason) as caught:
            coreset_reader.load(folder, colour)
        assert "\n" not in str(caught.value)
    other = exported(made._replace(classes=("a", "b", "c")), "npz", tmp_path / "it.npz")
    with pytest.raises(UserError, match="other classes than mine"):
        coreset_reader.load(other, colour)


def test_nothing_is_replaced_and_nothing_is_half_written(made, run, tmp_path, capsys):
    for kind in coreset_formats.FORMATS:
        out = suffixed(tmp_path / kind, kind)
        exported(made, kind, out)
        files = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="exists already"):
            exported(made, kind, out)
        assert files == {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        exported(made, "npz", tmp_path / "link")
    with pytest.raises(IsADirectoryError):
        coreset_formats.write({"a/b": b"", "a": b"", "README.md": b""}, tmp_path / "half")
    assert not [path for path in tmp_path.iterdir() if "half" in path.name]
    for words, reason in (
        (("--format", "gif"), "--format: must be one of"),
        (("--format", "npz", "--out", "s3://b/c"), "must be a local folder"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main.main(["export", str(run), *words])
        assert caught.value.code == 2
        assert reason in (capsys.readouterr().err).replace("\n", " ")
    with pytest.raises(SystemExit):
        main.main(["export", str(tmp_path), "--format", "npz"])
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_what_a_killed_export_left_is_removed_by_the_next(made, kind, tmp_path):
    out = suffixed(tmp_path / "x", kind)
    (out.parent / f".{out.name}.0f0f0f0f.tmp" / "below").mkdir(parents=True)
    (out.parent / f".{out.name}.1e1e1e1e.tmp").write_text("half")
    exported(made, kind, out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_coreset_without_its_data_set_is_one_line(run, capsys):
    for words, reason in (((), "--data: missing"), (("--data", "digits", "--split", "x"), "must be test")):
        with pytest.raises(SystemExit):
            main.main(["evaluate", "--coreset", str(RunDirectory(run).coreset_path), *words])
        assert reason in capsys.readouterr().err


BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from fbpc_ray.commands import main
run, out = sys.argv[1:]
main.main(["export", run, "--format", "hf", "--out", out])
main.main(["evaluate", "--coreset", out, "--data", "digits", "--width", "8", "--backend", "serial", "--num-chains", "1",
          "--chain-epochs", "2", "--chain-every", "1"])
"""


@pytest.mark.slow
def test_it_works_without_ray_and_mlflow(run, tmp_path):
    outcome = subprocess.run(
        [sys.executable, "-c", BARE, str(run), str(tmp_path / "set")], capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "convnet-in    given" in outcome.stdout
