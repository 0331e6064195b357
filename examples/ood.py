"""Out-of-distribution (OOD) images: are networks sampled on ten distilled digits less certain of photos and noise?

    python examples/ood.py                   # about a minute on two cores; --quick shows in seconds that it runs

AUROC: the probability that an OOD image gets a higher uncertainty than a digit. At 1/2 the uncertainty tells nothing;
below 1/2 the networks are more certain of OOD images than of digits. Entropy is all uncertainty, mutual information
the part that comes from posterior samples that disagree.
"""

import argparse
import statistics
from typing import Any

import numpy as np
from sklearn.datasets import load_sample_images

from fbpc_ray import auroc, dataset, distill, posterior

ROWS = "{:<11}{:<11}{:<19}{:<19}"


def ood_images(digits: np.ndarray) -> dict[str, np.ndarray]:
    """Return as many images (n, 1, 8, 8) uint8 of each kind as there are digits, drawn from a fixed seed."""
    source, count = np.random.default_rng(0), len(digits)
    photos: list[np.ndarray] = load_sample_images().images  # a temple and a flower, from scikit-learn
    patches = []
    for number in range(count):
        photo = photos[number % 2].mean(-1)
        top, left = (int(source.integers(size - 32)) for size in photo.shape)
        patches.append(photo[top : top + 32, left : left + 32].reshape(8, 4, 8, 4).mean((1, 3)))
    return {
        "photos": np.rint(np.stack(patches)[:, None]).astype(np.uint8),
        "noise": source.integers(0, 256, digits.shape, dtype=np.uint8),
        "inverted": 255 - digits,
        "rotated": np.ascontiguousarray(np.rot90(digits, axes=(2, 3))),
    }


def main(architecture: str, steps: int, chains: int, experts: str, quick: bool) -> None:
    data = dataset("digits")
    settings: dict[str, Any] = {"preset": "digits", "width": 16, "steps": steps, "experts": experts}
    if quick:
        settings |= {"expert_count": 1, "expert_epochs": 5, "gamma": 0.5, "posterior_steps": 3, "mc_samples": 3}
    coresets = {
        "random": distill(data, architecture, method="random", **settings),
        "distilled": distill(data, architecture, **settings),
    }
    n, kinds = len(data.test.labels), ood_images(data.test.images)
    print(f"\n{architecture}, {n} digits and {n} OOD images of each kind, mean (lowest to highest) of {chains} chains")
    print(ROWS.format("10 images", "OOD", "AUROC entropy", "AUROC mutual information").rstrip())
    for name, coreset in coresets.items():
        aurocs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        accuracies = []
        for seed in range(chains):
            short: dict[str, Any] = {"chain_epochs": 20, "chain_every": 10} if quick else {}
            samples = posterior(coreset, architecture, seed=seed, **short)
            of_digits = samples.predict(data.test.images)
            accuracies.append(of_digits.scores(data.test.labels).accuracy)
            for kind, images in kinds.items():
                of_ood = samples.predict(images)
                aurocs[kind].append((
                    auroc(of_digits.entropy, of_ood.entropy),
                    auroc(of_digits.mutual_information, of_ood.mutual_information),
                ))  # fmt: skip
        for kind, values in aurocs.items():
            print(
                ROWS.format(
                    name, kind, *(mean_and_range(list(column)) for column in zip(*values, strict=True))
                ).rstrip()
            )
        print(f"{name}: {100 * statistics.mean(accuracies):.1f} % of the digits are recognised\n")


def mean_and_range(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="convnet-in")
    parser.add_argument("--steps", type=int, default=60, help="updates of the coreset")
    parser.add_argument("--chains", type=int, default=3, help="SGHMC chains, each with ten posterior samples")
    parser.add_argument("--experts", default="experts", help="folder that keeps the expert trajectories")
    parser.add_argument("--quick", action="store_true", help="weak experts and short chains: no result")
    main(**vars(parser.parse_args()))
