"""Export: what is written is read by others, and here, to the bit; nothing is replaced."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.exports import same, write_export
from support.runs import distil, flags, refused

from fbpc_ray.commands import main
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import coreset, coreset_formats, coreset_reader
from fbpc_ray.data.datasets import Dataset, Split, denormalise, normalise
from fbpc_ray.distillation.run_directory import RunDirectory

EXACT = ("hf", "safetensors", "pt", "npz")


def path_with_suffix(folder: Path, kind: str) -> Path:
    return folder / f"it{coreset_formats.SINGLE.get(kind, '')}"


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("name", ["mine", "mine.v2"])
def test_a_file_without_a_known_suffix_is_read_by_its_content(original, colour_data, kind, name, tmp_path):
    outcome = coreset_reader.load(write_export(original, kind, tmp_path / name), colour_data)
    assert torch.equal(outcome.coreset.images, original.images) and torch.equal(outcome.coreset.labels, original.labels)


def scores_of(source: Path, config: Config, json_path: Path, *words: str) -> dict:
    e, n = config.evaluation, config.networks
    main.main([
        "evaluate", "--coreset", str(source), "--data", "digits", "--backend", "serial", "--architectures",
        *n.architectures, "--width", str(n.width), "--num-chains", str(e.num_chains), "--chain-epochs",
        str(e.chain_epochs), "--chain-every", str(e.chain_every), "--threads", "1", "--json", str(json_path), *words,
    ])  # fmt: skip
    return json.loads(json_path.read_text())


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_exported_scores_the_same_to_the_bit(exported_run, small, kind, tmp_path, capsys):
    """Under the path that is printed, whatever --out lacks of a suffix."""
    out = path_with_suffix(tmp_path, kind)
    main.main(["export", str(exported_run), "--format", kind, "--out", str(tmp_path / "it")])
    assert capsys.readouterr().out == f"export: {out}\n"
    for source in (out, exported_run):
        assert same(
            coreset_reader.load(source, _digits()).coreset, coreset.load(RunDirectory(exported_run).coreset_path)
        )
    before = json.loads(RunDirectory(exported_run).result_path.read_text())["coresets"]
    after = scores_of(out, small, tmp_path / "result.json")
    assert after["coresets"] == {"random": before["random"], "given": before["fbpc"]}
    assert before["random"] != before["fbpc"]
    assert (after["ipc"], after["images"], after["coreset"]) == (2, 20, str(out))


@pytest.mark.parametrize("kind", coreset_formats.FORMATS)
@pytest.mark.parametrize("name", ["", "it", "it.v2", "own"])
def test_every_format_is_read_under_the_path_that_export_prints(
    exported_run, small, kind, name, tmp_path, capsys, monkeypatch
):
    """By default, without a suffix, with a dot, and with the format's own name as suffix; png is rounded to 8 bits."""
    monkeypatch.setenv("FBPC_HOME", str(tmp_path))
    out = [] if not name else ["--out", str(tmp_path / (f"it.{kind}" if name == "own" else name))]
    main.main(["export", str(exported_run), "--format", kind, *out])
    printed = Path(capsys.readouterr().out.splitlines()[0].removeprefix("export: "))
    assert printed.suffix == coreset_formats.SINGLE.get(kind, printed.suffix)
    assert printed.is_dir() is (kind not in coreset_formats.SINGLE)
    expected, outcome = coreset.load(RunDirectory(exported_run).coreset_path), coreset_reader.load(printed, _digits())
    assert outcome.notes == ()
    if kind != "png":
        assert same(outcome.coreset, expected)
        return
    rounded = normalise(denormalise(expected.images, expected.mean, expected.std), expected.mean, expected.std)
    assert same(outcome.coreset, expected._replace(images=rounded))
    if name == "it":  # the others are evaluated by the test above
        assert scores_of(printed, small, tmp_path / "result.json")["images"] == 20


@pytest.mark.parametrize(
    ("kind", "name"), [("npz", "x.safetensors"), ("hf", "x.npz"), ("pt", "x.png"), ("png", "x.pt")]
)
def test_the_suffix_of_another_format_is_refused(exported_run, kind, name, tmp_path, capsys):
    text = refused(capsys, str(exported_run), "--format", kind, "--out", str(tmp_path / name), command="export")
    assert f"--out {name}: --format {kind} is " in text
    assert not (tmp_path / name).exists()


def _digits() -> Dataset:
    from fbpc_ray.data.datasets import load

    return load("digits")


def test_a_coreset_is_judged_by_its_own_normalisation(small, tmp_path):
    """Of a run with a validation split, whose constants are those of the other images."""
    folder, out = tmp_path / "run", tmp_path / "pair"
    small = small.updated(num_chains=1, chain_epochs=2, chain_every=1, architectures=("convnet-in",))
    distil(*flags(small, backend="serial", method="random", validation=0.3, seed=3, out=str(folder)))
    main.main(["export", str(folder), "--format", "pt", "--out", str(out)])
    before = json.loads(RunDirectory(folder).result_path.read_text())["coresets"]["random"]
    assert scores_of(out, small, tmp_path / "own.json")["coresets"]["given"] == before
    (out / coreset_formats.SIDECAR).unlink()
    assert scores_of(out, small, tmp_path / "other.json")["coresets"]["given"] != before
    again = scores_of(out, small, tmp_path / "told.json", "--validation", "0.3")
    assert again["coresets"]["given"] == before


@pytest.mark.parametrize("kind", EXACT)
def test_colours_names_and_normalisation_come_back(original, colour_data, kind, tmp_path):
    outcome = coreset_reader.load(write_export(original, kind, path_with_suffix(tmp_path, kind)), colour_data)
    assert same(outcome.coreset, original)
    assert outcome.notes == ()


@pytest.mark.parametrize("grey", [False, True])
def test_png_is_the_8_bit_picture(original, colour_data, grey, tmp_path):
    """Read back, it is what the rounded pixels are, class by class; exported again, nothing changes."""
    if grey:
        original = original._replace(
            images=original.images[:, :1].contiguous(), mean=original.mean[:1], std=original.std[:1]
        )
        train = Split(colour_data.train.images[:, :1].copy(), colour_data.train.labels)
        colour_data = colour_data._replace(train=train, mean=(0.5,), std=(0.2,))
    outcome = coreset_reader.load(write_export(original, "png", tmp_path / "one"), colour_data).coreset
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    rounded = normalise(denormalise(original.images, original.mean, original.std), original.mean, original.std)
    assert same(outcome, original._replace(images=rounded[order], labels=original.labels[order]))
    assert not torch.equal(rounded, original.images)
    assert same(coreset_reader.load(write_export(outcome, "png", tmp_path / "two"), colour_data).coreset, outcome)


@pytest.mark.parametrize("change", ["fewer images", "other classes", "another size"])
def test_a_coreset_of_another_run_is_not_exported(exported_run, change, tmp_path, capsys):
    """Its file is whole, its config.json and its random.safetensors tell."""
    copy = RunDirectory(shutil.copytree(exported_run, tmp_path / "run"))
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


def test_nothing_is_replaced_and_nothing_is_half_written(original, exported_run, tmp_path, capsys):
    for kind in coreset_formats.FORMATS:
        out = path_with_suffix(tmp_path / kind, kind)
        write_export(original, kind, out)
        files = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="exists already"):
            write_export(original, kind, out)
        assert files == {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        write_export(original, "npz", tmp_path / "link")
    with pytest.raises(IsADirectoryError):
        coreset_formats.write({"a/b": b"", "a": b"", "README.md": b""}, tmp_path / "half")
    assert not [path for path in tmp_path.iterdir() if "half" in path.name]
    for words, reason in (
        (("--format", "gif"), "--format: must be one of"),
        (("--format", "npz", "--out", "s3://b/c"), "must be a local folder"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main.main(["export", str(exported_run), *words])
        assert caught.value.code == 2
        assert reason in (capsys.readouterr().err).replace("\n", " ")
    with pytest.raises(SystemExit):
        main.main(["export", str(tmp_path), "--format", "npz"])
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_what_a_killed_export_left_is_removed_by_the_next(original, kind, tmp_path):
    out = path_with_suffix(tmp_path / "x", kind)
    (out.parent / f".{out.name}.0f0f0f0f.tmp" / "below").mkdir(parents=True)
    (out.parent / f".{out.name}.1e1e1e1e.tmp").write_text("half")
    write_export(original, kind, out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_coreset_without_its_data_set_is_one_line(exported_run, capsys):
    for words, reason in (((), "--data: missing"), (("--data", "digits", "--split", "x"), "must be test")):
        with pytest.raises(SystemExit):
            main.main(["evaluate", "--coreset", str(RunDirectory(exported_run).coreset_path), *words])
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
def test_it_works_without_ray_and_mlflow(exported_run, tmp_path):
    outcome = subprocess.run(
        [sys.executable, "-c", BARE, str(exported_run), str(tmp_path / "set")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "convnet-in    given" in outcome.stdout
