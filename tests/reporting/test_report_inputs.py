"""What `fbpc report` reads: runs that have ended, their later evaluations, and what it refuses."""

import json
import shutil

import pytest
from support.report_page import report_page
from support.runs import flags
from support.stores import BUCKET, s3_server

from fbpc_ray.commands import main
from fbpc_ray.core import inputs
from fbpc_ray.core.errors import UserError
from fbpc_ray.reporting import report, run_outputs


def refused(capsys, *words: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main.main(["report", *words])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def test_a_diverged_chain_is_shown(ended_runs, tmp_path):
    """With its seed; the mean is of the others."""
    folder = shutil.copytree(ended_runs["fbpc"], tmp_path / "run")
    result = inputs.read_checked_json(folder / "result.json")
    for values in result["coresets"]["fbpc"]["convnet-in"].values():
        values[1] = None
    result["coresets"]["random"]["convnet-bn"] = {name: [None, None] for name in ("accuracy", "nll", "ece", "brier")}
    (folder / "result.json").write_text(json.dumps(result))
    outcome = report_page(tmp_path, folder)
    rows = {tuple(row[:2]): row[2:] for row in outcome.table("network", "coreset", "accuracy %")}
    left = result["coresets"]["fbpc"]["convnet-in"]
    assert rows["convnet-in", "fbpc"][1] == f"{left['nll'][0]:.3f} (1 of 2 diverged)"
    assert rows["convnet-bn", "random"] == ["diverged"] * 4
    assert ["convnet-in", "fbpc", "1", *["diverged"] * 4] in outcome.table("network", "coreset", "seed")


def test_the_scores_of_fewer_steps_are_not_those_of_the_coreset(ended_runs, small, tmp_path, monkeypatch):
    """A run that goes on with more steps writes its coreset before it is judged, which takes long and may be killed."""
    folder = tmp_path / "run"
    shutil.copytree(ended_runs["fbpc"], folder)
    words = flags(small, steps=5, backend="serial", device="cpu", out=str(folder))

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(run_outputs, "evaluate", killed)
        main.main(["distill", *words, "--resume"])
    with pytest.raises(UserError, match=r"has not ended \(its result is of step 4, its coreset of step 5\).* --resume"):
        report.report([str(folder)], str(tmp_path / "r.html"), print)
    for name, has_scores in ((folder, False), (ended_runs["fbpc"], True)):
        main.main(["export", str(name), "--format", "hf", "--out", str(tmp_path / f"{has_scores}")])
        assert ("accuracy %" in (tmp_path / f"{has_scores}" / "README.md").read_text()) == has_scores
    main.main(["distill", *words, "--resume"])
    report.report([str(folder)], str(tmp_path / "r.html"), print)


def test_later_evaluations_are_there(ended_runs, tmp_path):
    """With their AUROC and pictures."""
    folder = shutil.copytree(ended_runs["fbpc"], tmp_path / "run")
    result = inputs.read_checked_json(folder / "result.json")
    for s in (s for scores in result["coresets"].values() for s in scores.values()):
        s["ood_auroc_entropy"] = [0.25, 0.75]
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "001-test-x.json").write_text(json.dumps(result | {"ood": "strange"}))
    shutil.copy(folder / "reliability.png", folder / "evaluations" / "001-test-x.reliability.png")
    page = report_page(tmp_path, folder)
    assert "Evaluated later on convnet-in, convnet-bn, test split" in page.text and "strange" in page.text
    table = next(table for table in page.tables if "AUROC OOD entropy" in table[0] and "seed" not in table[0])
    assert {row[-1] for row in table[1:]} == {"0.500 ± 0.354"}
    assert len(page.of("img")) == 11


def test_what_is_no_ended_run_is_one_line(ended_runs, tmp_path, capsys):
    out = ("--out", str(tmp_path / "r.html"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no run" in refused(capsys, str(empty), *out)
    assert "holds no run" in refused(capsys, str(tmp_path / "nowhere"), *out)

    def broken(name: str, content: bytes | None) -> str:
        folder = shutil.copytree(ended_runs["fbpc"], tmp_path / f"broken-{len(list(tmp_path.iterdir()))}")
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return refused(capsys, str(ended_runs["random"]), str(folder), *out)

    message = broken("result.json", None)
    assert "has not ended" in message and "--resume" in message
    (empty / "sweep.json").write_text("{}")
    assert "is a sweep" in refused(capsys, str(empty), *out)
    trial = shutil.copytree(ended_runs["fbpc"], tmp_path / "trial")
    (trial / "trial.json").write_text("{}")
    (trial / "result.json").unlink()
    assert "is a trial" in refused(capsys, str(trial), *out)
    assert "coreset not found" in broken("coreset/coreset.safetensors", None)
    result = inputs.read_checked_json(ended_runs["fbpc"] / "result.json")
    for content in (b"{", b"[]", b'{"steps": 1, "coresets": {}}', json.dumps(result | {"data": 1}).encode()):
        assert "result.json" in broken("result.json", content)
    infinite = {"a": {"b": {"accuracy": [float("inf")], "nll": [1], "ece": [1], "brier": [1]}}}
    for scores in ({}, {"a": {"b": {}}}, {"a": {"b": {"accuracy": 1}}}, {"a": []}, infinite):
        assert "result.json" in broken("result.json", json.dumps(result | {"coresets": scores}).encode())
    assert "metrics.parquet is damaged" in broken("metrics.parquet", b"PAR1")
    assert "is not a PNG" in broken("coreset.png", b"GIF89a")
    assert "config.json" in broken("config.json", b"[]")
    assert not (tmp_path / "r.html").exists() and not (tmp_path / "r.md").exists()


def test_nothing_else_is_overwritten(ended_runs, tmp_path, capsys):
    run = str(ended_runs["random"])
    assert ".html" in refused(capsys, run, "--out", str(tmp_path / "report.txt"))
    for name in ("mine.html", "mine.md"):
        (tmp_path / name).write_text("my own")
        assert "is not a report" in refused(capsys, run, "--out", str(tmp_path / "mine.html"))
        assert (tmp_path / name).read_text() == "my own"
        (tmp_path / name).unlink()
    assert "name a run" in refused(capsys)


def test_a_run_in_an_object_store(ended_runs, tmp_path, monkeypatch):
    """Read from S3 and written to it, the same page as from the disk."""
    from fbpc_ray.core import storage

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "me")
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        away = storage.place(f"s3://{BUCKET}/runs/fbpc")
        (away / "evaluations/001-test.json").write_bytes((ended_runs["fbpc"] / "result.json").read_bytes())
        (away / "evaluations/001-test.reliability.png").write_bytes((ended_runs["fbpc"] / "coreset.png").read_bytes())
        for path in ended_runs["fbpc"].rglob("*"):
            if path.is_file():
                (away / str(path.relative_to(ended_runs["fbpc"]))).write_bytes(path.read_bytes())
        here = report_page(tmp_path, str(away))
        main.main(["report", str(away), "--out", f"s3://{BUCKET}/pages/it.html"])
        page_in_store = storage.place(f"s3://{BUCKET}/pages/it.html").read_text()
        assert storage.place(f"s3://{BUCKET}/pages/it-files/run-steps-1.png").is_file()
    near = report_page(tmp_path, ended_runs["fbpc"])
    assert all(table in here.tables for table in near.tables) and "evaluations/001-test.json" in here.text
    assert len(here.of("img")) == len(near.of("img")) + 1 == page_in_store.count("<img")
    assert f"place('{away}/coreset" in here.codes[1]
