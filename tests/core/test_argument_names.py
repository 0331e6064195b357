"""Errors of the Python API name arguments."""

import pytest

from fbpc_ray.core.argument_names import names_arguments, with_arguments
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
    ],
)
def test_flags_of_settings_become_arguments(message, expected):
    assert with_arguments(message) == expected


def test_a_function_keeps_its_name_and_the_code_of_its_error():
    @names_arguments
    def raises(line: str) -> None:
        """Raise."""
        raise UserError(line, code=1) from ValueError("cause")

    assert (raises.__name__, raises.__doc__) == ("raises", "Raise.")
    with pytest.raises(UserError, match=r"^seed: no$") as caught:
        raises("--seed: no")
    assert caught.value.code == 1 and isinstance(caught.value.__cause__, ValueError)
