"""Errors and the log of the Python API name arguments."""

import ast
import re
from pathlib import Path

import pytest

import fbpc_ray
from fbpc_ray.core.argument_names import names_arguments, with_arguments, with_overrides
from fbpc_ray.core.errors import UserError


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--width: must be 1 or more, got 0", "width: must be 1 or more, got 0"),
        ("add --validation 0.1", "add validation=0.1"),
        ("lower --expert-lr", "lower expert_lr"),
        ("--device cuda, but no GPU: use --device cpu", "device='cuda', but no GPU: use device='cpu'"),
        ("make --width a multiple of 8", "make width a multiple of 8"),
        ("--alpha 1e-05 is small", "alpha=1e-05 is small"),
        ("data are missing: add --download", "data are missing: add download=True"),
        ("it logs: --no-tracking leaves it out", "it logs: tracking=False leaves it out"),
        ("--architectures a b: a is there twice", "architectures a b: a is there twice"),
        ("resume it with `fbpc distill --out x --width 8`", "resume it with `fbpc distill --out x --width 8`"),
        ("--format gif", "--format gif"),
        ("name its folder with --data-root", "name its folder with root"),
        ("give --pixels normalised", "give pixels='normalised'"),
        ("--preset quick | laptop | gpu, or", "preset='quick' | 'laptop' | 'gpu', or"),
        ("--time-budget 20m takes longer", "time_budget='20m' takes longer"),
        ("--memory-budget '' --chunk-images 0", "memory_budget='' chunk_images=0"),
        ("--width   8  wide\n--steps   9  few", "width     8  wide\nsteps     9  few"),
        ("Ray lost a task: run the same command with --resume", "Ray lost a task: call the function again"),
        ("run the same command again, or with --backend serial", "call the function again, or with backend='serial'"),
        ("delete it and run again", "delete it and call the function again"),
    ],
)
def test_flags_of_settings_become_arguments(message, expected):
    assert with_arguments(message) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--gamma: must be above 0, got 0", "--override gamma=...: must be above 0, got 0"),
        ("--width 7 has no groups: make --width a multiple of 8",
         "--override width=7 has no groups: make --override width=... a multiple of 8"),
        ("--learn-labels: leave it out, or --no-learn-labels",
         "--override learn_labels=true: leave it out, or --override learn_labels=false"),
        ("give --memory-budget '' --chunk-images 0", "give --override memory_budget='' chunk_images=0"),
        ("lower --alpha, --lambda-x or --lambda-u",
         "lower --override alpha=..., --override lambda_x=... or --override lambda_u=..."),
        ("--ipc 3: use --device cpu", "--ipc 3: use --device cpu"),
        ("--method vbpc supports fp32 alone", "method vbpc supports fp32 alone"),
        ("its data set (--data), or --image-size 8", "its data set (--cifar10), or --override image_size=8"),
        ("score it by `fbpc evaluate --width 8`", "score it by `fbpc evaluate --width 8`"),
    ],
)  # fmt: skip
def test_flags_of_settings_become_overrides(message, expected):
    fixed = {"method": "method", "data": "--cifar10"}
    assert with_overrides(message, {"ipc", "device"}, fixed) == expected


def test_a_function_keeps_its_name_and_the_code_of_its_error():
    @names_arguments
    def raises(line: str) -> None:
        """Raise."""
        raise UserError(line, code=1) from ValueError("cause")

    assert (raises.__name__, raises.__doc__) == ("raises", "Raise.")
    with pytest.raises(UserError, match=r"^seed: no$") as caught:
        raises("--seed: no")
    assert caught.value.code == 1 and isinstance(caught.value.__cause__, ValueError)


def test_the_log_of_a_function_names_arguments():
    """Whether the caller gives `log`, or the default takes the lines."""
    lines: list[str] = []

    @names_arguments
    def inner(*, log=lines.append) -> None:
        log("note: lower --alpha")

    inner()
    inner(log=lambda line: lines.append(f"mine: {line}"))
    assert lines == ["note: lower alpha", "mine: note: lower alpha"]


ROOMS = ("core", "data", "models", "inference", "evaluation", "distillation", "execution")
OF_COMMANDS = {
    "--dry-run", "--format", "--json", "--out", "--resume", "--ood", "--ood-resize", "--protocol",
    "--coreset", "--override",
}  # fmt: skip
"""Flags in messages that only commands reach: the files of runs and exports, plans, calibration, OOD images, tables."""
OF_OTHER_PROGRAMS = {"--porcelain", "--short", "--untracked-files", "--version", "--working-dir"}
"""Flags of git, the compiler and Ray."""


def literals(path: Path) -> list[str]:
    """The text in the code of a file that is no docstring: statements that are a string alone."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_each_flag_that_a_message_names_has_an_argument():
    """A message below the commands may reach a caller of the API, who has no flags."""
    root = Path(fbpc_ray.__file__).parent
    unknown = {
        (flag, path.name)
        for room in ROOMS
        for path in (root / room).rglob("*.py")
        for text in literals(path)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]\b(?!-)", text)
        if with_arguments(flag) == flag and flag not in OF_COMMANDS | OF_OTHER_PROGRAMS
    }
    assert not unknown
