"""Experts (method.md section 1) against a plain SGD loop, and the real images that feed them."""

import signal
from itertools import islice, pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from fbpc_ray.data import datasets
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.expert_training import train_expert
from fbpc_ray.models.functional import Network, Spec


@pytest.fixture
def data(digits):
    """The first 150 real digits: 8x8, one channel, ten classes."""
    images, labels = datasets.tensors(digits.train, "cpu")
    return DeviceDataset(images[:150], labels[:150], digits.mean, digits.std)


class Recorder(DeviceDataset):
    """Real data that keeps what it was asked and what it gave."""

    def __init__(self, data):
        super().__init__(data.images, data.labels, data.mean, data.std)
        self.asked, self.given = [], []

    def epoch(self, size, augment, source):
        self.asked.append((size, augment))
        batches = list(super().epoch(size, augment, source))
        self.given.append(batches)
        return iter(batches)


def network(name="convnet-in", width=8):
    return Network(Spec(name, (1, 8, 8), 10, width, 2))


def snapshots(net, data, **changes):
    """Copies of the states that `train_expert` yields."""
    settings = {
        "epochs": 3, "learning_rate": 0.1, "batch_size": 32, "augment": "dsa", "seed": 0, "index": 0,
    } | changes  # fmt: skip
    return [{name: value.clone() for name, value in state.items()} for state in train_expert(net, data, **settings)]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_trajectory_has_epochs_plus_one_states_and_the_first_is_an_initialisation(data):
    """Snapshots at epochs 0..E, 0 before any step: the same with no epochs at all, whatever the learning rate."""
    net = network()
    states = snapshots(net, data)
    assert len(states) == 4
    assert equal(states[0], snapshots(net, data, epochs=0, learning_rate=5.0, batch_size=7)[0])
    fresh = net.module(torch.Generator().manual_seed(0)).state_dict()
    assert {name: value.shape for name, value in states[0].items()} == {n: v.shape for n, v in fresh.items()}
    bound = (8 * 2 * 2) ** -0.5  # of the head's default initialisation: no step has been taken
    assert 0.9 * bound < states[0]["head.weight"].abs().max() <= bound
    for one, other in pairwise(states):
        assert not equal(one, other)


@pytest.mark.parametrize("name", ["convnet-in", "convnet-ln", "convnet-bn"])
def test_epochs_are_plain_sgd_on_the_mean_cross_entropy(name, data):
    """theta <- theta - lr grad, batch after batch, with no momentum, no decay and a constant rate, over three epochs.

    The loop uses a module, autograd and the batches that were given, and no optimiser; BatchNorm's buffers go with it.
    """
    net, recorder = network(name), Recorder(data)
    states = snapshots(net, recorder, learning_rate=0.2)
    assert recorder.asked == [(32, "dsa")] * 3
    module = net.module(torch.Generator().manual_seed(99))
    module.load_state_dict(states[0])
    module.train()
    for state, batches in zip(states[1:], recorder.given, strict=True):
        assert [len(batch.labels) for batch in batches] == [32, 32, 32, 32, 22]
        for images, labels in batches:
            loss = -log_softmax(module(images), 1)[torch.arange(len(labels)), labels].sum() / len(labels)
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                    parameter -= 0.2 * gradient
        for key, value in module.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


def test_a_full_batch_epoch_is_one_gradient_step(data):
    """Without augmentation and with batch n the order of the images doesn't count: theta_1 = theta_0 - lr grad L."""
    net = network()
    states = snapshots(net, data, epochs=2, augment="none", batch_size=150)
    images, labels = data.batch(torch.arange(150))
    for before, after in pairwise(states):
        params = {name: value.clone().requires_grad_() for name, value in before.items()}
        gradients = torch.autograd.grad(cross_entropy(net.forward(params, images), labels), list(params.values()))
        for (name, value), gradient in zip(before.items(), gradients, strict=True):
            torch.testing.assert_close(after[name], value - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_each_epoch_has_batches_of_its_own(data):
    """A new order and new augmentations at every epoch: the draws of one epoch are not used again in the next."""
    recorder = Recorder(data)
    snapshots(network(), recorder, augment="none")
    orders = [torch.cat([batch.labels for batch in batches]) for batches in recorder.given]
    assert not any(torch.equal(orders[i], orders[j]) for i, j in [(0, 1), (1, 2), (0, 2)])
    augmented = Recorder(data)
    snapshots(network(), augmented, epochs=12)
    first = torch.stack([batches[0].images for batches in augmented.given])
    assert not any(torch.equal(first[0], other) for other in first[1:])


def test_a_trajectory_is_a_function_of_seed_and_index(data):
    """Same arguments, same bits, whatever the global generator; another index or seed changes start and course."""
    net = network()
    reference = snapshots(net, data, epochs=2)
    before = torch.random.get_rng_state()
    again = snapshots(network(), data, epochs=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(equal(one, other) for one, other in zip(reference, again, strict=True))
    for change in ({"index": 1}, {"seed": 1}, {"seed": 1, "index": 1}):
        other = snapshots(net, data, epochs=2, **change)
        assert not torch.equal(other[0]["head.weight"], reference[0]["head.weight"])
        recorders = [Recorder(data), Recorder(data)]
        snapshots(net, recorders[0], epochs=1)
        snapshots(net, recorders[1], epochs=1, **change)
        assert not torch.equal(recorders[0].given[0][0].labels, recorders[1].given[0][0].labels)


def test_a_longer_trajectory_begins_like_the_shorter(data):
    """Epoch e doesn't depend on how many follow."""
    short, long = snapshots(network(), data, epochs=1), snapshots(network(), data, epochs=3)
    assert all(equal(one, other) for one, other in zip(short, long, strict=False))


def test_batchnorm_buffers_are_part_of_every_state(data):
    """Peers lost them. They begin at 0 and 1, move with every epoch, and count 5 batches per epoch."""
    states = snapshots(network("convnet-bn"), data)
    mean, variance, count = (f"features.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))
    assert torch.equal(states[0][mean], torch.zeros(8))
    assert torch.equal(states[0][variance], torch.ones(8))
    assert [int(state[count]) for state in states] == [0, 5, 10, 15]
    for one, other in pairwise(states):
        assert not torch.equal(one[mean], other[mean])
        assert not torch.equal(one[variance], other[variance])


def test_states_are_plain_tensors_on_the_cpu(data):
    """They are written to disk: no graph, no device."""
    for state in train_expert(network("convnet-bn"), data, epochs=1, learning_rate=0.1, batch_size=64, augment="dsa",
                       seed=0, index=0):  # fmt: skip
        assert not any(value.requires_grad for value in state.values())
        assert {value.device.type for value in state.values()} == {"cpu"}


def test_the_loss_on_real_digits_falls(digits):
    """Mean cross-entropy and accuracy on all training digits, not augmented, after five epochs with DSA."""
    data = DeviceDataset(*datasets.tensors(digits.train, "cpu"), digits.mean, digits.std)
    net, everything = network(width=16), data.batch(torch.arange(len(data)))
    losses, hits = [], []
    for state in snapshots(net, data, epochs=5, batch_size=32):
        with torch.no_grad():
            logits = net.forward(net.parameters_of(state), everything.images)
        losses.append(cross_entropy(logits, everything.labels).item())
        hits.append((logits.argmax(1) == everything.labels).float().mean().item())
    assert losses[0] > 2
    assert losses[5] < 0.4
    assert losses[5] < losses[2] < losses[0]
    assert hits[5] > 0.85


# --- RealData ---


@pytest.fixture
def counted():
    """n = 50 images, each of the one grey value that is its index, and its index as its label."""
    index = torch.arange(50)
    return DeviceDataset(
        index.to(torch.uint8).view(-1, 1, 1, 1).expand(50, 1, 4, 4).contiguous(), index, (0.0,), (1.0,)
    )


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def test_batch_normalises_per_channel_and_keeps_pairs():
    """(x / 255 - mean) / std by hand, float32; image i goes with label i, in the order asked."""
    images = torch.randint(256, (6, 3, 2, 2), generator=source()).to(torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    data = DeviceDataset(images, torch.arange(6) * 10, mean, std)
    index = torch.tensor([4, 0, 4])
    batch = data.batch(index)
    assert batch.images.dtype == torch.float32
    assert batch.labels.tolist() == [40, 0, 40]
    for b, i in enumerate(index.tolist()):
        for c in range(3):
            expected = (images[i, c].double() / 255 - mean[c]) / std[c]
            torch.testing.assert_close(batch.images[b, c].double(), expected, rtol=1e-5, atol=1e-5)
    assert len(data) == 6


@pytest.mark.parametrize("size", [1, 7, 10, 50, 64])
def test_an_epoch_has_every_image_exactly_once(size, counted):
    """All full batches but the last, every image with its own label, in another order for another generator."""
    batches = list(counted.epoch(size, "none", source()))
    labels = torch.cat([batch.labels for batch in batches])
    assert sorted(labels.tolist()) == list(range(50))
    assert [len(batch.labels) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert len(batches[-1].labels) == (50 % size or min(size, 50))
    for batch in batches:
        assert torch.equal((batch.images[:, 0, 0, 0] * 255).round().long(), batch.labels)
    assert labels.tolist() != list(range(50))
    other = torch.cat([batch.labels for batch in counted.epoch(size, "none", source(1))])
    assert labels.tolist() != other.tolist()


def test_an_epoch_augments_every_batch_with_a_draw_of_its_own(data):
    """Method section 1: DSA on every batch, a fresh operation each; labels, shapes and the data set stay."""
    before = data.images.clone()
    for batch in data.epoch(30, "dsa", source()):
        assert batch.images.shape == (30, 1, 8, 8)
        assert batch.labels.shape == (30,)
    tall = DeviceDataset(before[:1].expand(3000, -1, -1, -1), torch.zeros(3000, dtype=torch.int64), data.mean, data.std)
    plain = tall.batch(torch.arange(1)).images
    outs = [batch.images for batch in tall.epoch(10, "dsa", source())]
    assert len({tuple(out.flatten().tolist()) for out in outs}) > 290  # two batches of flips may agree
    changed = torch.stack([(out - plain).abs().amax((1, 2, 3)) > 1e-6 for out in outs]).float().mean()
    assert changed > 0.6  # all but half of the flips and the shifts by nothing
    assert torch.equal(data.images, before)


def test_a_stream_has_exact_sizes_and_never_ends(counted):
    """Batches of 16 of 50 images: three an epoch, without their remainder, each epoch in an order of its own."""
    batches = list(islice(counted.stream(16, "none", source()), 12))
    assert [len(batch.labels) for batch in batches] == [16] * 12
    epochs = [torch.cat([batch.labels for batch in batches[i : i + 3]]).tolist() for i in range(0, 12, 3)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)  # no image twice in an epoch
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({label for epoch in epochs for label in epoch}) == 50  # the remainder is another one each time


@pytest.fixture
def in_time():
    """An alarm after five minutes: a stream that looks for a batch that never comes would hang."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("nothing came in 300 s"))
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("size", [50, 51, 1000])
def test_a_stream_of_batches_above_n_gives_all_images_each_time(size, counted, in_time):
    """min(size, n) images: the whole set, again and again, in new orders."""
    batches = list(islice(counted.stream(size, "none", source()), 4))
    assert all(sorted(batch.labels.tolist()) == list(range(50)) for batch in batches)
    assert len({tuple(batch.labels.tolist()) for batch in batches}) == 4


def test_a_stream_is_augmented_and_a_function_of_its_generator(counted):
    """The same generator gives the same batches; with dsa they are not the plain ones."""
    one, same, other = (list(islice(counted.stream(20, "dsa", source(seed)), 5)) for seed in (0, 0, 1))
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not all(torch.equal(a.labels, b.labels) for a, b in zip(one, other, strict=True))
    plain = [counted.images[batch.labels].float() / 255 for batch in one]
    assert not all(torch.equal(a.images, b) for a, b in zip(one, plain, strict=True))
