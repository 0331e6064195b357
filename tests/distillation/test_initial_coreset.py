"""`--initial-coreset`: the state before step 1 is a coreset's, that of the comparison stays real images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.runs import SMALL_VBPC, flags_of, images_of, refused, silent

from fbpc_ray import api
from fbpc_ray.commands import main
from fbpc_ray.core import memory
from fbpc_ray.core.config import Config
from fbpc_ray.core.errors import UserError
from fbpc_ray.data import coreset
from fbpc_ray.data.coreset import Coreset
from fbpc_ray.distillation.run_directory import RunDirectory
from fbpc_ray.distillation.state import begin_as, initial_state, with_soft_labels
from fbpc_ray.execution import advice, session
from fbpc_ray.reporting import run_reader
from fbpc_ray.reporting.document import Picture
from fbpc_ray.reporting.run_pictures import before_picture

SETTINGS = SMALL_VBPC | {"steps": 2, "checkpoint_every": 1, "num_chains": 1, "net_steps": 2, "backend": "serial"}


def given_for(digits, ipc=1, seed=5, classes=None) -> Coreset:
    """Real images of another seed, its classes in reverse order; row i of the soft labels rises in steps of i + 1."""
    first, labels = initial_state(digits, ipc, seed)
    soft = torch.arange(1.0, 1 + len(labels))[:, None] * torch.arange(10.0)
    return Coreset(first.images.flip(0), labels.flip(0), digits.mean, digits.std, classes or digits.classes, soft)


@pytest.fixture
def path(digits, tmp_path):
    where = tmp_path / "given.safetensors"
    coreset.save(given_for(digits), where)
    return where


def opened_with(digits, path, **changes):
    return session.open_session(Config().updated(**SETTINGS | changes, initial_coreset=str(path)), silent, digits)


def test_images_in_the_order_of_the_labels(digits):
    state, labels = initial_state(digits, 2, 0)
    given = given_for(digits, ipc=2)
    begun = begin_as(state, labels, given, digits)
    for label in range(10):
        assert torch.equal(begun.images[labels == label], given.images[given.labels == label])
    assert not torch.equal(begun.images, state.images)
    assert begun.step == 0 and not begun.velocity.any()


def test_another_normalisation_is_converted(digits):
    state, labels = initial_state(digits, 1, 0)
    first, _ = initial_state(digits, 1, 5)
    pixels = first.images * digits.std[0] + digits.mean[0]
    given = Coreset((pixels - 0.25) / 2.0, labels, (0.25,), (2.0,), digits.classes)
    begun = begin_as(state, labels, given, digits)
    assert torch.allclose(begun.images, first.images, atol=1e-5)


def test_soft_labels_are_centred_logits_of_methods_that_learn_them(digits):
    state, labels = initial_state(digits, 1, 0)
    given = given_for(digits)
    assert begin_as(state, labels, given, digits).soft_labels is None
    learning = with_soft_labels(state, labels, 10, 1.0)
    begun = begin_as(learning, labels, given, digits).soft_labels
    assert begun is not None and given.soft_labels is not None
    assert torch.equal(begun, torch.arange(10.0, 0, -1)[:, None] * (torch.arange(10.0) - 4.5))  # class 9 came first
    without = begin_as(learning, labels, given._replace(soft_labels=None), digits).soft_labels
    assert without is learning.soft_labels


def test_other_numbers_of_images_are_refused(digits):
    state, labels = initial_state(digits, 1, 0)
    with pytest.raises(UserError, match="it has 2 images per class, --ipc is 1: give --ipc 2"):
        begin_as(state, labels, given_for(digits, ipc=2), digits)
    uneven = given_for(digits)._replace(labels=torch.tensor([0, *range(1, 9), 8]))
    with pytest.raises(UserError, match="it has 0 to 2 images per class, --ipc is 1: choose another one"):
        begin_as(state, labels, uneven, digits)


def test_a_session_begins_with_it_and_is_compared_with_real_images(digits, path):
    plain = session.open_session(Config().updated(**SETTINGS), silent, digits)
    opened = opened_with(digits, path)
    assert torch.equal(opened.initial[0].images, given_for(digits).images.flip(0))
    assert torch.equal(opened.real[0].images, plain.initial[0].images)
    assert torch.equal(opened.labels, plain.labels)


@pytest.mark.slow
def test_a_run(digits, path, tmp_path, monkeypatch):
    """Relative path, resumed elsewhere; Python gives the same bits by a path and by a coreset."""
    folder = tmp_path / "run"
    words = [*flags_of(SETTINGS), "--out", str(folder), "--initial-coreset"]
    monkeypatch.chdir(path.parent)
    main.main(["distill", *words, path.name, "--steps", "1"])
    monkeypatch.chdir("/")
    main.main(["distill", *words, str(path), "--resume"])
    assert torch.equal(coreset.load(RunDirectory(folder).random_path).images, initial_state(digits, 1, 0)[0].images)
    caption = "The images of --initial-coreset that distillation starts from."
    picture = Picture(RunDirectory(folder).before_path.read_bytes(), "1-before", caption)
    assert before_picture(run_reader.read(folder, ""), "1") == [picture]
    settings = {name: value for name, value in SETTINGS.items() if name != "tracking"}
    for given in (path, given_for(digits)):
        again = api.distill(digits, initial_coreset=given, log=silent, **settings)
        assert torch.equal(again.images, images_of(folder))
    assert not torch.equal(api.distill(digits, log=silent, **settings).images, images_of(folder))


@pytest.mark.slow
def test_a_resumed_run_needs_the_file_no_more(digits, path, tmp_path, capsys):
    """A file that is gone changes no bit; the picture of the first run stays."""
    folders = tmp_path / "kept", tmp_path / "gone"
    words = [*flags_of(SETTINGS), "--initial-coreset", str(path)]
    for folder in folders:
        main.main(["distill", *words, "--out", str(folder), "--steps", "1"])
    main.main(["distill", *words, "--out", str(folders[0]), "--resume"])
    path.unlink()
    resume = ["--out", str(folders[1]), "--resume", "--steps", "2"]
    main.main(["distill", *resume, "--dry-run"])
    main.main(["distill", *resume])
    assert torch.equal(images_of(folders[0]), images_of(folders[1]))
    pictures = [RunDirectory(folder).before_path.read_bytes() for folder in folders]
    assert pictures[0] == pictures[1]
    capsys.readouterr()
    RunDirectory(folders[1]).before_path.unlink()
    main.main(["distill", *resume[:3], "--steps", "3"])
    assert "note: before.png is left out: " in capsys.readouterr().out
    main.main(["report", str(folders[1])])
    main.main(["export", str(folders[1]), "--format", "npz", "--out", str(tmp_path / "out.npz")])
    main.main(["evaluate", str(folders[1]), "--backend", "serial", "--architectures", "convnet-in"])


def test_the_state_of_a_checkpoint_needs_no_file(digits, path, tmp_path):
    opened, run = opened_with(digits, path), RunDirectory(tmp_path / "run")
    state, rows = opened.start(run)
    assert (state.step, rows) == (0, [])
    assert torch.equal(state.images, opened.initial[0].images)
    run.write_config(opened.config)
    run.save(state._replace(step=1), [{"step": 1, "architecture": "convnet-in"}, {"step": 2, "architecture": "a"}])
    path.unlink()
    later = opened_with(digits, path)
    restored, rows = later.start(run)
    assert (restored.step, [row["step"] for row in rows]) == (1, [1])
    resumed = replace(later, restored=restored)
    assert resumed.current is restored
    assert not [note for note in advice.notes(resumed) if "initial-coreset" in note]
    run.state_path.unlink()
    with pytest.raises(UserError, match=r"given\.safetensors: coreset not found"):
        later.start(run)


def test_a_file_above_the_memory_is_not_read(digits, path, monkeypatch):
    opened = opened_with(digits, path)
    monkeypatch.setattr(memory, "available", lambda: 1000.0)
    with pytest.raises(UserError, match=r"given.safetensors: a coreset of .* does not fit into memory"):
        _ = opened.initial


def test_notes(digits, path):
    left_out = "note: --initial-coreset: its soft labels are left out; add --learn-labels to begin with them"
    assert left_out in advice.notes(opened_with(digits, path, method="fbpc"))
    assert left_out not in advice.notes(opened_with(digits, path, method="fbpc", learn_labels=True))
    assert left_out not in advice.notes(opened_with(digits, path))


def test_what_is_assumed_of_pixels_names_no_flag_and_can_be_corrected(digits, tmp_path):
    """`distill` has no --pixels: Python converts the file."""
    images = np.linspace(0, 1, 640, dtype=np.float32).reshape(10, 1, 8, 8)
    path, new = tmp_path / "unit.npz", tmp_path / "new.safetensors"
    np.savez(path, images=images, labels=np.arange(10))
    assert (
        "note: --initial-coreset: pixels taken as 0..1; if they are normalised, convert the file in Python: "
        "`save(load_coreset(FILE, DATA, pixels='normalised'), NEW)`"
    ) in advice.notes(opened_with(digits, path))
    api.save(api.load_coreset(path, digits, pixels="normalised", log=silent), new)
    converted = opened_with(digits, new)
    assert not [note for note in advice.notes(converted) if "pixels" in note]
    assert torch.equal(converted.initial[0].images, torch.from_numpy(images))
    np.savez(path, images=255 * images, labels=np.arange(10))
    with pytest.raises(UserError, match=r"images are floats from 0 to 255; save uint8, or divide them by 255$"):
        _ = opened_with(digits, path).initial


def test_wrong_ones_are_one_line(digits, path, tmp_path, capsys):
    assert "nowhere.npz: coreset not found" in refused(capsys, "--initial-coreset", "nowhere.npz", "--dry-run")
    line = refused(
        capsys, "--initial-coreset", str(path), "--ipc", "2", "--method", "vbpc", "--out", str(tmp_path / "a")
    )
    assert "it has 1 images per class, --ipc is 2: give --ipc 1" in line
    assert not (tmp_path / "a").exists()
    assert "--method random learns nothing" in refused(capsys, "--initial-coreset", str(path), "--method", "random")
    with pytest.raises(UserError, match="initial_coreset: method='random' learns nothing"):
        api.distill(digits, method="random", initial_coreset=given_for(digits), log=silent)
    others = given_for(digits, classes=tuple("abcdefghij"))
    with pytest.raises(UserError, match="initial_coreset has other classes than digits"):
        api.distill(digits, method="vbpc", initial_coreset=others, log=silent)
    with pytest.raises(UserError, match="initial_coreset"):
        api.distill(digits, method="vbpc", initial_coreset=3, log=silent)  # type: ignore[arg-type]
