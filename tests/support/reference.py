"""The gradients written the obvious way: nn.Modules, torch.optim, K logits in a list, one image at a time for the
likelihood. Slow and plain, it is what `fbpc_ray.methods` are held against; it shares only the draws."""

import copy
from itertools import count, islice

import torch
from torch import Tensor, nn

from fbpc_ray.core.config import Distillation
from fbpc_ray.core.rng import generator, seeded_globally
from fbpc_ray.data import augment as dsa
from fbpc_ray.data.loader import DeviceDataset
from fbpc_ray.distillation.methods.common import GradientContext, coreset_batches
from fbpc_ray.models.functional import Spec, build


def gradient(
    spec: Spec,
    snapshots: list[dict[str, Tensor]],
    real: DeviceDataset,
    images: Tensor,
    labels: Tensor,
    step: int,
    s: Distillation,
) -> Tensor:
    """Eq. 17 for one expert with `snapshots` (epochs 0..E), all of u in every batch, DSA on."""

    def rng(purpose: str) -> torch.Generator:
        return generator(s.seed, "step", step, spec.architecture, purpose)

    def fresh() -> nn.Module:
        with seeded_globally(rng("prior")):
            return build(spec).train()

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.CrossEntropyLoss()(module(x), y)

    def variance_of(module: nn.Module, batches, rate: float, x: Tensor) -> Tensor:
        module = copy.deepcopy(module)
        optimiser = torch.optim.SGD(module.parameters(), lr=rate)
        logits = []
        for batch, target in batches:
            optimiser.zero_grad()
            loss(module, batch, target).backward()
            optimiser.step()
            logits.append(module(x).detach().double())
        stack = torch.stack(logits)
        return ((stack - stack.mean(0)) ** 2).mean(0).float()

    u = images.clone().requires_grad_()
    drawn = dsa.draw(len(labels), rng("augment"))
    x = dsa.apply(drawn, u)

    source = rng("expert")
    torch.randint(1, (), generator=source)  # the expert: there is one
    module_x = fresh()
    epoch = s.start_epoch + int(torch.randint(len(snapshots) - s.start_epoch, (), generator=source))
    module_x.load_state_dict(snapshots[epoch])

    stream = real.stream(s.real_batch_size, "dsa", generator(0, "x-side", spec.architecture, 0, epoch))
    real_batches = [next(stream) for _ in range(s.posterior_steps)]
    psi_x = variance_of(module_x, real_batches, s.lambda_x, x.detach())

    module_u, source = fresh(), rng("map")
    optimiser = torch.optim.Adam(module_u.parameters(), lr=s.map_lr)
    for number in count():
        value = loss(module_u, dsa.apply(dsa.draw(len(labels), source), images), labels)
        if value.item() <= s.gamma or number == s.map_max_steps:
            break
        optimiser.zero_grad()
        value.backward()
        optimiser.step()

    source = rng("coreset")
    own = [(dsa.apply(dsa.draw(len(labels), source), images), labels) for _ in range(s.posterior_steps)]
    psi_u = variance_of(module_u, own, s.lambda_u, x.detach())

    source = rng("monte-carlo")
    shape = (s.mc_samples, len(labels), spec.classes)
    total = torch.zeros(())
    for module, psi, sign in ((module_x, psi_x, 1.0), (module_u, psi_u, -1.0)):
        noise, mean = torch.randn(shape, generator=source), module(x)
        for draw in noise:
            for i, label in enumerate(labels):
                log_p = (mean[i] + psi[i].sqrt() * draw[i]).log_softmax(0)[label]
                total = total - sign * log_p / (len(labels) * s.mc_samples)
    total.backward()
    assert u.grad is not None
    return u.grad


def weight_space(problem: GradientContext, snapshots: list[dict[str, Tensor]], images: Tensor, step: int) -> Tensor:
    """Eqs. 5-7 for one expert with `snapshots` (epochs 0..E), all of u in every batch, DSA on: fKL, rKL or W."""
    s, labels, m = problem.settings, problem.labels, len(problem.labels)
    shape = images.shape

    def rng(purpose: str) -> torch.Generator:
        return generator(s.seed, "step", step, problem.network.spec.architecture, purpose)

    def module_of(snapshot: dict[str, Tensor]) -> nn.Module:
        module = build(problem.network.spec).train()
        module.load_state_dict(snapshot)
        return module

    def shaken(module: nn.Module, source: torch.Generator) -> nn.Module:
        module = copy.deepcopy(module)
        with torch.no_grad():
            for value in module.parameters():
                value += s.weight_noise * torch.randn(value.shape, generator=source)
        return module

    ahead = {"bpc-fkl": 1, "bpc-rkl": 0, "bpc-w": 2}[s.method]
    source = rng("expert")
    torch.randint(1, (), generator=source)  # the expert: there is one
    epoch = int(torch.randint(s.start_epoch, (), generator=source))
    theta_0, mu_x = module_of(snapshots[epoch]), module_of(snapshots[epoch + ahead])
    u = images.clone().requires_grad_()

    if s.method == "bpc-w":  # one vector, functional_call, and the definition
        names = [name for name, _ in theta_0.named_parameters()]
        flat, start = [nn.utils.parameters_to_vector(net.parameters()).detach() for net in (mu_x, theta_0)]
        sizes = [value.numel() for value in theta_0.parameters()]
        shapes = [value.shape for value in theta_0.parameters()]
        vector = start.clone().requires_grad_()
        for batch in islice(coreset_batches(u, labels, m, "dsa", rng("coreset")), s.syn_steps):
            parts = [part.view(size) for part, size in zip(vector.split(sizes), shapes, strict=True)]
            logits = torch.func.functional_call(theta_0, dict(zip(names, parts, strict=True)), (batch.images,))
            (slope,) = torch.autograd.grad(nn.CrossEntropyLoss()(logits, labels), vector, create_graph=True)
            vector = vector - s.inner_lr * slope
        (((vector - flat) ** 2).sum() / ((start - flat) ** 2).sum()).backward()
        assert u.grad is not None
        return u.grad

    mu_u, source = copy.deepcopy(theta_0), rng("coreset")
    optimiser = torch.optim.SGD(mu_u.parameters(), lr=s.inner_lr)
    for _ in range(s.syn_steps):
        optimiser.zero_grad()
        nn.CrossEntropyLoss()(mu_u(dsa.apply(dsa.draw(m, source), images)), labels).backward()
        optimiser.step()

    noise, source = rng("monte-carlo"), rng("augment")
    if s.method == "bpc-fkl":
        views = [dsa.draw(m, source) for _ in range(s.views or s.mc_samples)]
        for number in range(s.mc_samples):
            x = dsa.apply(views[number % len(views)], u)
            of_x, of_u = shaken(mu_x, noise)(x).log_softmax(-1), shaken(mu_u, noise)(x).log_softmax(-1)
            for j, label in enumerate(labels):
                ((of_u[j, label] - of_x[j, label]) / (m * s.mc_samples)).backward(retain_graph=True)
        assert u.grad is not None
        return u.grad

    authors = s.rkl_estimator == "authors"  # mean losses of images that are not augmented, and 1 / S
    real = next(problem.real.stream(s.real_batch_size, "none" if authors else "dsa", rng("real")))
    n, m_u = (1, 1) if authors else (len(problem.real), m)
    drawn, gaps, slopes = dsa.draw(m, source), [], []
    for _ in range(s.mc_samples):
        net, leaf = shaken(mu_u, noise), images.clone().requires_grad_()
        loss_u = nn.CrossEntropyLoss()(net(leaf if authors else dsa.apply(drawn, leaf)), labels)
        potential_x = n * nn.CrossEntropyLoss()(net(real.images), real.labels)
        slopes.append(torch.autograd.grad(loss_u, leaf)[0].double())
        gaps.append((potential_x - m_u * loss_u).double().item())
    gap, slope = torch.tensor(gaps, dtype=torch.float64), torch.stack(slopes)
    centred = (gap - gap.mean()).view(-1, *[1] * len(shape)) * (slope - slope.mean(0))
    return (-centred.sum(0) / (s.mc_samples - (0 if authors else 1))).float()
