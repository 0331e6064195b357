"""The six operations of DSA as slow loops in numpy, as method.md section 3 states them: (c, h, w) and uniforms."""

import math

import numpy as np


def unit_grid(u: float, low: int, high: int) -> int:
    """A uniform on [0, 1) cut into equal parts, one for each of low..high."""
    return low + math.floor(u * (high - low + 1))


def slow_color(image, u):
    """Brightness +-.5 added; saturation U[0, 2] about a pixel's channel mean; contrast U[.5, 1.5] about the image's."""
    c, h, w = image.shape
    out = image + (u[0] - 0.5)
    for y in range(h):
        for x in range(w):
            grey = sum(out[k, y, x] for k in range(c)) / c
            for k in range(c):
                out[k, y, x] = grey + 2 * u[1] * (out[k, y, x] - grey)
    mean = out.sum() / (c * h * w)
    return mean + (0.5 + u[2]) * (out - mean)


def slow_crop(image, u):
    """Pixel (y, x) goes to (y + down, x + right) where that is inside; nothing else is set."""
    _, h, w = image.shape
    reach_h, reach_w = math.floor(h / 8 + 0.5), math.floor(w / 8 + 0.5)
    down, right = unit_grid(u[0], -reach_h, reach_h), unit_grid(u[1], -reach_w, reach_w)
    out = np.zeros_like(image)
    for y in range(h):
        for x in range(w):
            if 0 <= y + down < h and 0 <= x + right < w:
                out[:, y + down, x + right] = image[:, y, x]
    return out


def slow_cutout(image, u):
    """Zero where the pixel's centre is nearer to the square's centre than half its side, on both axes.

    A square of an even side is centred on a corner between pixels (there are size + 1), one of an odd side on a pixel.
    """
    _, h, w = image.shape
    out, near = image.copy(), []
    for size, uniform in ((h, u[0]), (w, u[1])):
        side = math.floor(size / 2 + 0.5)
        centre = unit_grid(uniform, 0, size) if side % 2 == 0 else unit_grid(uniform, 0, size - 1) + 0.5
        near.append([abs(pixel + 0.5 - centre) < side / 2 for pixel in range(size)])
    for y in range(h):
        for x in range(w):
            if near[0][y] and near[1][x]:
                out[:, y, x] = 0
    return out


def slow_flip(image, u):
    """Columns in reverse order where the uniform is below one half."""
    _, _, w = image.shape
    return np.stack([image[:, :, w - 1 - x] for x in range(w)], 2) if u[0] < 0.5 else image


def slow_warp(image, source_of):
    """out(x, y) = image at source_of(x, y), bilinear between pixel centres, zero outside; (0, 0) is the middle."""
    _, h, w = image.shape
    out = np.zeros_like(image)
    for i in range(h):
        for j in range(w):
            x, y = source_of(j + 0.5 - w / 2, i + 0.5 - h / 2)
            column, row = x + w / 2 - 0.5, y + h / 2 - 0.5
            for near_row in (math.floor(row), math.floor(row) + 1):
                for near_column in (math.floor(column), math.floor(column) + 1):
                    if 0 <= near_row < h and 0 <= near_column < w:
                        share = (1 - abs(row - near_row)) * (1 - abs(column - near_column))
                        out[:, i, j] += share * image[:, near_row, near_column]
    return out


def slow_scale(image, u):
    """Each axis is read at U[1/1.2, 1.2] times the distance from the middle."""
    horizontal, vertical = (1 / 1.2 + v * (1.2 - 1 / 1.2) for v in u[:2])
    return slow_warp(image, lambda x, y: (horizontal * x, vertical * y))


def slow_rotate(image, u):
    """Read at the position turned by U[-15, 15] degrees, lengths in units of half the image (so pixels, if square)."""
    _, h, w = image.shape
    angle = math.radians(-15 + 30 * u[0])

    def source_of(x, y):
        x, y = x / (w / 2), y / (h / 2)
        turned = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
        return turned[0] * w / 2, turned[1] * h / 2

    return slow_warp(image, source_of)


SLOW = {
    "color": slow_color, "crop": slow_crop, "cutout": slow_cutout, "flip": slow_flip, "scale": slow_scale,
    "rotate": slow_rotate,
}  # fmt: skip
