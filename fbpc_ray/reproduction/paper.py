"""Numbers that the paper prints: {table: {(row, column): {quantity: (mean, +-)}}}.

Accuracy and degradation are in per cent. Tables 3, 6, 7 and 8 have no +-: None. Fig. 2a prints no numbers.
"""

Value = tuple[float, float | None]
Numbers = dict[tuple[str, str], dict[str, Value]]


def _scores(columns: list[str], rows: dict[str, tuple[list[Value], list[Value]]]) -> Numbers:
    """Combine rows of accuracy and NLL."""
    return {
        (row, column): {"accuracy": accuracy, "nll": nll}
        for row, (accuracies, nlls) in rows.items()
        for column, accuracy, nll in zip(columns, accuracies, nlls, strict=True)
    }


def _single(quantity: str, columns: list[str], rows: dict[str, list[Value]]) -> Numbers:
    return {
        (row, column): {quantity: value}
        for row, values in rows.items()
        for column, value in zip(columns, values, strict=True)
    }


def _exact(quantity: str, columns: list[str], rows: dict[str, list[float]]) -> Numbers:
    return _single(quantity, columns, {row: [(value, None) for value in values] for row, values in rows.items()})


IPC = ["ipc 1", "ipc 10", "ipc 50"]
CORRUPTIONS = ["BN", "DB", "ET", "FT", "GB", "JPEG", "MB", "PIX", "SN", "SP", "Avg."]

TABLE1 = _scores(IPC, {
    "Random": ([(16.30, 0.74), (32.48, 0.34), (49.68, 0.46)], [(4.66, 0.03), (2.98, 0.03), (2.06, 0.02)]),
    "BPC-rKL": ([(20.44, 1.06), (37.92, 0.66), (51.86, 0.38)], [(4.51, 0.10), (2.47, 0.04), (1.95, 0.02)]),
    "BPC-fKL": ([(34.50, 1.62), (56.19, 0.61), (64.74, 0.32)], [(3.86, 0.13), (1.48, 0.02), (1.26, 0.01)]),
    "FBPC-isotropic": ([(32.00, 0.75), (61.43, 0.35), (71.33, 0.19)], [(3.40, 0.27), (1.35, 0.02), (1.03, 0.01)]),
    "FBPC": ([(35.45, 0.31), (62.33, 0.34), (71.23, 0.17)], [(3.79, 0.04), (1.31, 0.02), (1.03, 0.05)]),
})  # fmt: skip

TABLE2 = _scores([f"CIFAR100 {ipc}" for ipc in IPC] + [f"Tiny-ImageNet {ipc}" for ipc in IPC], {
    "Random": (
        [(4.82, 0.47), (18.0, 0.31), (35.1, 0.23), (1.90, 0.08), (7.21, 0.04), (19.15, 0.12)],
        [(5.55, 0.07), (4.57, 0.01), (3.35, 0.01), (6.18, 0.04), (5.77, 0.02), (4.88, 0.01)],
    ),
    "BPC-fKL": (
        [(14.7, 0.16), (28.1, 0.60), (37.1, 0.33), (3.98, 0.13), (11.4, 0.45), (22.18, 0.32)],
        [(4.17, 0.05), (3.53, 0.05), (3.28, 0.24), (5.63, 0.03), (5.08, 0.05), (4.65, 0.02)],
    ),
    "FBPC": (
        [(21.0, 0.76), (39.7, 0.31), (44.47, 0.35), (10.14, 0.68), (19.42, 0.51), (26.43, 0.31)],
        [(3.76, 0.11), (2.67, 0.02), (2.63, 0.01), (4.69, 0.05), (4.14, 0.02), (4.30, 0.05)],
    ),
})  # fmt: skip

_ACCURACY = {
    "BPC-fKL": [33.5, 34.0, 35.9, 25.1, 33.7, 39.1, 32.7, 38.3, 28.9, 41.2, 34.3],
    "FBPC": [48.9, 46.4, 47.6, 41.7, 44.0, 52.0, 44.3, 51.0, 47.1, 52.3, 47.5],
}
_DEGRADATION = {
    "BPC-fKL": [40.3, 39.4, 36.0, 55.2, 39.9, 30.3, 41.6, 31.6, 48.4, 26.5, 38.9],
    "FBPC": [21.5, 25.7, 23.7, 33.0, 29.3, 16.4, 28.8, 18.1, 24.4, 16.1, 23.7],
}
TABLE3: Numbers = {
    key: {**accuracy, **_exact("degradation", CORRUPTIONS, _DEGRADATION)[key]}
    for key, accuracy in _exact("accuracy", CORRUPTIONS, _ACCURACY).items()
}

TABLE5 = _scores(["ConvNet", "ResNet18", "ResNet34", "VGG", "AlexNet"], {
    "ipc 1": (
        [(35.71, 0.90), (27.7, 0.96), (22.46, 0.12), (26.33, 0.88), (21.05, 0.43)],
        [(3.44, 0.07), (2.87, 0.13), (3.06, 0.02), (5.38, 0.74), (3.13, 0.60)],
    ),
    "ipc 10": (
        [(62.53, 0.34), (47.51, 1.73), (35.48, 1.22), (47.87, 1.18), (32.27, 0.78)],
        [(1.31, 0.01), (1.82, 0.02), (2.41, 0.01), (3.72, 0.09), (2.96, 0.04)],
    ),
    "ipc 50": (
        [(71.20, 0.36), (62.02, 1.55), (47.97, 3.37), (58.24, 1.63), (52.42, 1.30)],
        [(1.03, 0.00), (1.41, 0.05), (2.10, 0.10), (3.03, 0.26), (2.08, 0.07)],
    ),
})  # fmt: skip

TABLE6: Numbers = {
    ("ResNet18", "on ResNet18"): {"accuracy": (50.00, None), "nll": (1.75, None)},
    ("ResNet18 + ConvNet", "on ResNet18"): {"accuracy": (54.90, None), "nll": (1.56, None)},
    ("ResNet18 + ConvNet", "on ConvNet"): {"accuracy": (60.03, None)},
}

TABLE7 = _exact(
    "peak_gb", ["LeNet", "ConvNet", "ResNet18"], {"FBPC": [0.02, 0.32, 2.56], "BPC-fKL": [0.11, 3.17, 12.18]}
)
TABLE8 = _exact("peak_gb", IPC, {"FBPC": [0.04, 0.32, 1.59], "BPC-fKL": [0.41, 3.17, 15.59]})
TABLE9 = _single("seconds", IPC, {
    "BPC-fKL": [(1.04, 0.10), (1.37, 0.13), (2.59, 0.86)],
    "FBPC": [(1.5, 0.15), (3.29, 0.51), (8.38, 0.48)],
})  # fmt: skip
TABLE10 = _single("accuracy", IPC, {
    "BPC-fKL (no DSA)": [(37.26, 1.65), (50.48, 1.39), (60.75, 0.26)],
    "FBPC (no DSA)": [(33.69, 2.73), (55.07, 1.30), (66.03, 0.21)],
    "FBPC (DSA)": [(35.45, 0.31), (62.33, 0.34), (71.23, 0.17)],
})  # fmt: skip

PAPER: dict[str, Numbers] = {
    "table1": TABLE1, "table2": TABLE2, "table3": TABLE3, "table5": TABLE5, "table6": TABLE6,
    "table7": TABLE7, "table8": TABLE8, "table9": TABLE9, "table10": TABLE10,
}  # fmt: skip
