"""execution/timing.py: what a plan multiplies is what a step repeats, in operations, which no other work changes."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fbpc_ray.core.presets import with_method
from fbpc_ray.core.signals import Interruption
from fbpc_ray.execution import timing
from fbpc_ray.execution.backends import open_backend
from fbpc_ray.execution.session import open_session

CONV, CONV_BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


class Counter(TorchDispatchMode):
    """Counts the multiply-accumulates of convolutions, nearly all of a ConvNet's: forwards, and backwards for each of
    the two gradients that are asked for. (torch.utils.flop_counter imports the compiler, which takes seconds.)"""

    macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (CONV, CONV_BACKWARD):
            outputs, weight = (result, args[1]) if func is CONV else (args[0], args[2])
            times = 1 if func is CONV else sum(args[-1][:2])
            self.macs += times * len(outputs) * outputs.shape[2:].numel() * weight.numel()
        return result


@pytest.fixture
def operations(monkeypatch):
    """A counter of operations, which `timing` takes for its clock."""
    with Counter() as counter:

        class Clock:
            def __init__(self, device: torch.device):
                self.before = counter.macs

            def lap(self) -> float:
                self.before, before = counter.macs, self.before
                return float(self.before - before)

        monkeypatch.setattr(timing, "Clock", Clock)
        yield counter


@pytest.mark.parametrize(
    ("method", "steps", "views"),
    [("fbpc", 1, 0), ("fbpc", 1, 8), ("fbpc-isotropic", 1, 0), ("bpc-fkl", 1, 0), ("bpc-w", 1, 0), ("vbpc", 2, 0),
     ("frepo", 2, 0)],
)  # fmt: skip
def test_the_estimate_of_a_gradient_is_that_of_a_step(method, steps, views, small, digits, operations):
    """In the second step a network of the pool is used again. FBPC's K steps on real images count apart."""
    more = {"method": method, "steps": steps, "map_max_steps": 3, "gamma": 1e-9, "syn_steps": 20, "pool_size": 1}
    more |= {"views": views}
    more |= {"real_batch_size": 64, "architectures": ("convnet-in",), "backend": "serial", "threads": 1}
    config = with_method(small, method, 1).updated(**more, compiled="off")
    session = open_session(config, print, digits)
    timings = timing.time_network(session, session.specs[0], "cpu")._replace(map_steps=3)
    expected = timing._gradient(config, timings)
    if method == "fbpc":
        expected += config.distillation.posterior_steps * timings.k_step
    counts = []
    with open_backend(config, Interruption(()), print) as workers:
        before = operations.macs
        for _ in session.steps(session.initial[0], workers):
            counts.append(operations.macs - before)
            before += counts[-1]
    assert counts[-1] == pytest.approx(expected, rel=0.15)


def test_passes_are_timed_with_the_batches_of_the_run(small, digits, operations):
    """By hand, of ConvNet at width 8 on 8x8: its convolutions take 9 x 8 x 64 and 9 x 8 x 8 x 16 multiply-accumulates
    an image forwards, as many again for the weights and, but for the first one's, for its input."""
    first, second = 9 * 8 * 64, 9 * 8 * 8 * 16
    forwards, both = first + second, 2 * first + 3 * second
    config = small.updated(
        architectures=("convnet-in",), expert_batch_size=16, real_batch_size=40, batch_size=5, chain_full_batch=20,
        backend="serial",
    )  # fmt: skip
    session = open_session(config, print, digits)
    timings = timing.time_network(session, session.specs[0], "cpu")
    assert timings.map_steps == 40, "the usual ones, of a solve for which a probe has no time"
    assert timings[:2] == pytest.approx((16 * both, 5 * both))
    assert timings[3:] == pytest.approx((40 * both, 10 * both, forwards))


@pytest.mark.parametrize(("laps", "mean"), [([0.9, 0.1, 0.3, 0.2, 9], 0.2), ([1.1, 9], 1.1)])
def test_a_pass_is_timed_after_its_first_call_for_half_a_second(laps, mean, monkeypatch):
    """A first call of more than a second is not repeated."""
    monkeypatch.setattr(timing, "Clock", lambda device: SimpleNamespace(lap=iter(laps).__next__))
    network = SimpleNamespace(device=None)
    assert timing._seconds(lambda: None, network) == pytest.approx(mean)  # type: ignore[arg-type]
