"""Words of a command line: what is refused, in one line; naming a default changes no run; old names of flags."""

import pytest
from support.runs import flags, refused

from fbpc_ray.commands import main
from fbpc_ray.commands.arguments import KINDS, ExpertArguments, TuneArguments
from fbpc_ray.commands.parsing import distill_arguments, explanation, flags_of, parse, start_of
from fbpc_ray.core.config import Config
from fbpc_ray.core.presets import PRESETS, preset, to_preset

EARLY = ("data", "ipc", "method", "architectures", "address", "out")
"""Flags that decide which defaults the others have."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distill --stepz 3", "--stepz: fbpc distill has no such flag; did you mean --steps or --syn-steps or"),
        ("distill --no-traking", "--no-traking: fbpc distill has no such flag"),
        ("doctor --x", "--x: fbpc doctor has no such flag; see fbpc doctor --help"),
        ("distill --steps x", "--steps: must be a whole number, got 'x'; see fbpc distill --help"),
        ("distill --steps 1.5", "--steps: must be a whole number, got '1.5'"),
        ("distill --alpha ten", "--alpha: must be a number, got 'ten'"),
        ("distill --steps", "--steps: the value is missing"),
        ("distill --ipc", "--ipc: the value is missing"),
        ("distill --ipc 1 2", "2: unexpected, or one value too many for the flag before it"),
        ("distill --tracking 3", "3: unexpected"),
        ("distill --map-init warmer", "--map-init: must be one of 'prior', 'warm', got 'warmer'"),
        ("distill --resume perhaps --out x", "--resume: must be one of 'no', 'yes', 'auto', got 'perhaps'"),
        ("distill --method fbcp", "--method: got 'fbcp'; did you mean fbpc"),
        ("distill --data", "--data: the value is missing"),
        ("evaluate", "RUN: missing; see fbpc evaluate --help"),
        ("export run", "--format: missing"),
        ("export run --format gif", "--format: must be one of 'hf', 'safetensors'"),
        ("reproduce table1 --ipc one", "--ipc: got the unexpected value 'one'"),
        ("evaluate --coreset x", "--data: missing; name the data set"),
        (
            "reproduce fig3 --override gamma=1 --override steps=2",
            "--override: given 2 times; give all its values after",
        ),
        ("distill --architectures convnet-in --architectures=vgg11", "--architectures: given 2 times; give all its"),
        ("tunee", "unknown command 'tunee': did you mean tune?"),
    ],
)
def test_words_that_do_not_parse_are_one_line(words, message, capsys, monkeypatch):
    """On a narrow terminal, where tyro breaks its lines; the next test has a wide one."""
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit) as error:
        main.main(words.split())
    output = capsys.readouterr()
    assert (error.value.code, output.out) == (2, "")
    assert output.err.startswith(f"error: {message}")
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distill --map-init warmer", "--map-init: must be one of 'prior', 'warm', got 'warmer'; see"),
        ("evaluate", "RUN: missing; see"),
        ("distill --tracking 3", "3: unexpected, or one value too many for the flag before it; see"),
    ],
)
def test_the_width_of_the_terminal_changes_no_error(words, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert refused(capsys, *words.split()[1:], command=words.split()[0]).startswith(f"error: {message}")


def test_an_error_that_we_have_no_words_for_is_one_line_too():
    """With box characters, as a terminal in UTF-8 has them, and without."""
    box = ["╭─ New ─╮", "│ It is │", "│ so.   │", "│ ───── │", "│ More  │", "╰───────╯"]
    plain = [" New", " -----", "  It is", "  so. ", "  -----", "  More", " -----"]
    assert explanation("\n".join(box)) == explanation("\n".join(plain)) == "It is so."
    assert explanation("plain\n") == "plain"


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_naming_a_default_changes_no_run(name):
    """Each flag that others' defaults depend on, alone, and all flags at once."""
    row = [] if name is None else ["--preset", name]
    config = distill_arguments(row).config
    assert config == preset(name or "digits")
    flat = config.flat()
    for flag in EARLY:
        values = flat[flag] if isinstance(flat[flag], tuple) else (str(flat[flag]),)
        assert start_of([*row, f"--{flag}", *values])[0] == config, flag
    assert distill_arguments([*row, *flags(config)]).config == config
    assert distill_arguments(["--data", flat["data"], "--ipc", str(flat["ipc"])]).config == config


def test_naming_a_default_changes_no_experts_and_no_sweep():
    for words in ([], ["--data", "digits"]):
        base, _ = start_of(words)
        default = ExpertArguments(data=base.data, networks=base.networks, experts=base.experts)
        assert parse(ExpertArguments, words, "fbpc experts", default).experts == preset("digits").experts
        assert parse(TuneArguments, words, "fbpc tune", TuneArguments(config=base)).config == preset("digits")


def test_a_preset_file_keeps_its_values_when_its_method_is_named(tmp_path):
    """--method brings a baseline's own settings only where it changes the method."""
    path = tmp_path / "best.json"
    path.write_text(to_preset(preset("digits").updated(method="bpc-w", alpha=3.5, steps=7)))
    assert distill_arguments(["--preset", str(path), "--method", "bpc-w"]).config == preset(str(path))
    assert distill_arguments(["--preset", str(path), "--method", "bpc-fkl"]).config.distillation.alpha == 1000


def test_every_setting_is_a_flag():
    """Of distill, of tune, and within a group of the commands that have it."""
    settings = set(Config().flat())
    assert settings | {"preset", "recipe", "resume", "time_budget", "dry_run", "print_config", "json"} == flags_of(
        KINDS["distill"][0]
    )
    assert settings < flags_of(TuneArguments)
    assert {"num_chains", "chain_epochs", "threads"} < flags_of(KINDS["evaluate"][0]) & flags_of(KINDS["evaluate"][1])


def test_a_recipe_sets_its_parts_and_other_flags_change_it():
    """--recipe improved is views and learned labels; paper, the default, changes nothing."""
    words = ["--preset", "cifar10-ipc10"]
    assert distill_arguments([*words, "--recipe", "paper"]).config == distill_arguments(words).config
    improved = distill_arguments([*words, "--recipe", "improved"]).config
    assert improved == distill_arguments([*words, "--views", "8", "--learn-labels"]).config
    assert distill_arguments([*words, "--recipe", "improved", "--views", "2"]).config == improved.updated(views=2)
