"""Algorithm 1's gradient written the obvious way: nn.Modules, torch.optim, K logits in a list, one image at a time for
the likelihood. Slow and plain, it is what `distill.gradient` is held against; it shares only the draws."""

import copy

import torch
from torch import Tensor, nn

from fbpc_ray.config import Distillation
from fbpc_ray.rng import generator, seeded_globally
from fbpc_ray.vision import augment as dsa
from fbpc_ray.vision.realdata import RealData
from fbpc_ray.vision.zoo import Spec, build


def gradient(
    spec: Spec,
    snapshots: list[dict[str, Tensor]],
    real: RealData,
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

    stream = real.stream(s.real_batch_size, "dsa", rng("real"))
    real_batches = [next(stream) for _ in range(s.posterior_steps)]
    psi_x = variance_of(module_x, real_batches, s.lambda_x, x.detach())

    module_u, source = fresh(), rng("map")
    optimiser = torch.optim.Adam(module_u.parameters(), lr=s.map_lr)
    while True:
        value = loss(module_u, dsa.apply(dsa.draw(len(labels), source), images), labels)
        if value.item() <= s.gamma:
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
