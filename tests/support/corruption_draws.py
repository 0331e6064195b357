"""Draws and comparisons for tests of corruptions."""

from typing import Any

import numpy as np
import torch

from fbpc_ray.core.rng import generator

PUBLISHED: dict[str, list[Any]] = {
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "elastic_transform": [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
    "jpeg_compression": [80, 65, 58, 50, 40],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "snow": [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ],
    "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
}  # fmt: skip


def draws(name: str, severity: int, index: int, seed: int = 0) -> torch.Generator:
    return generator(seed, "corruption", name, severity, index)


def levels(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, cut off."""
    return np.floor(np.clip(pixels, 0, 1) * 255 + 1e-3).astype(np.uint8)


def agree(actual: np.ndarray, expected: np.ndarray, share: float = 2e-3) -> None:
    """Equal but for a few single levels, where float32 and float64 fall on two sides of a whole one."""
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and np.mean(difference > 0) <= share, (difference.max(), np.mean(difference > 0))
