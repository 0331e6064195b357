"""The closed-form last layer against laplace-torch's last-layer Laplace approximation, for which it is exact."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fbpc_ray.inference.last_layer import posterior, predictive

RHO, SIGMA2 = 2.0, 0.3


@pytest.mark.slow  # the library takes 10 s of CPU to import
@pytest.mark.filterwarnings("ignore")  # of the library's own dependencies
@pytest.mark.parametrize("n", [7, 20])
def test_mean_and_variance_are_those_of_laplace_torch(n):
    """Squared loss, full covariance, at the MAP weights of a linear layer on 9 features for 3 classes, float64."""
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    source = torch.Generator().manual_seed(0)
    features, targets, at = (
        torch.randn(size, generator=source, dtype=torch.float64) for size in ((n, 9), (n, 3), (5, 9))
    )
    layer = posterior(features, targets, ridge=RHO * SIGMA2, precision=RHO)
    head = nn.Linear(9, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_((layer.features.T @ layer.weights).T)
    reference = laplace.Laplace(
        nn.Sequential(nn.Identity(), head), "regression", subset_of_weights="last_layer", hessian_structure="full",
        prior_precision=RHO, sigma_noise=SIGMA2**0.5,
    )  # fmt: skip
    reference.fit(DataLoader(TensorDataset(features, targets), batch_size=4))
    mean, covariance = reference(at)
    expected_mean, expected_variance = predictive(layer, at)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    each = expected_variance[:, None, None] * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(covariance.double(), each, rtol=1e-5, atol=1e-6)
