"""ConvNet and its norms written out by hand."""

from torch.nn.functional import avg_pool2d, conv2d


def moments(x, axes):
    """Mean and biased variance over `axes`, kept for broadcasting."""
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


def normalised(x, norm, stats=None):
    """Each norm by its axes: IN an image's channel, GN a quarter of the channels, LN all of an image, BN the batch."""
    b, c, h, w = x.shape
    if norm == "in":
        mean, variance = moments(x, (2, 3))
    elif norm == "ln":
        mean, variance = moments(x, (1, 2, 3))
    elif norm == "gn":
        x = x.view(b, 4, c // 4, h, w)
        mean, variance = moments(x, (2, 3, 4))
    else:
        mean, variance = moments(x, (0, 2, 3)) if stats is None else (s.view(1, -1, 1, 1) for s in stats)
    return ((x - mean) / (variance + 1e-5).sqrt()).view(b, c, h, w)


def by_hand(params, x, norm, seen=None, stats=None):
    """D x (conv3x3 pad 1 - norm - ReLU - average pool 2), flatten, linear, from the parameters in their order.

    `seen` collects what enters each norm; `stats` [(mean, variance)] replaces BatchNorm's batch statistics.
    """
    values = list(params.values())
    *blocks, head_weight, head_bias = values
    size = 2 if norm == "none" else 4
    for i in range(0, len(blocks), size):
        x = conv2d(x, blocks[i], blocks[i + 1], padding=1)
        if norm != "none":
            if seen is not None:
                seen.append(x)
            weight, bias = (p if p.ndim == 3 else p.view(-1, 1, 1) for p in blocks[i + 2 : i + 4])
            x = normalised(x, norm, stats[i // 4] if stats else None) * weight + bias
        x = avg_pool2d(x.clamp(min=0), 2)
    return x.flatten(1) @ head_weight.T + head_bias
