"""Pictures of values: the `plot` of a lower room calls the functions that reporting/ registers here."""

import io
from functools import singledispatch
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@singledispatch
def draw_png(value: Any, **options: Any) -> bytes:
    """Draw `value` as a PNG. Raises NotImplementedError where nothing is registered for its type."""
    raise NotImplementedError(f"{type(value).__name__}: import fbpc_ray.api, which registers the drawings")


def draw(value: Any, **options: Any) -> "Image.Image":
    """Draw `value` as a picture, which notebooks show and `save` writes."""
    from PIL import Image

    return Image.open(io.BytesIO(draw_png(value, **options)))
