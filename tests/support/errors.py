"""The line that refuses bad input."""

from collections.abc import Callable
from typing import Any

import pytest

from fbpc_ray.core.errors import UserError


def refusal(call: Callable[..., Any], *values: Any, **options: Any) -> str:
    """Return the one line of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*values, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
