"""Measure how good generated images are: compare their features (n, D) with those of reference images (m, D).

torchmetrics computes FID, KID and the Inception score, in float64. It has no precision and recall, so this module
computes them.
"""

import math
import warnings
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from ddpm_pipe.evaluation.config import MIN_COUNT
from ddpm_pipe.evaluation.features import torch_fidelity_importable
from ddpm_pipe.evaluation.results import Metric

FULL_COUNT = 50_000
"""A metric of fewer generated images has their number in its name, because its value depends on it."""

SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
BLOCK = 1000  # features that are processed at a time


def import_torchmetrics(module: str) -> ModuleType:
    """Import a module of torchmetrics.image.

    Raises:
        ValueError: where it cannot be imported.
    """
    try:
        with torch_fidelity_importable():  # torchmetrics imports torch-fidelity if installed
            return import_module(f"torchmetrics.image.{module}")
    except Exception as error:  # of any kind: torchmetrics tries to import many other packages
        raise ValueError(
            f"evaluation needs torchmetrics, which cannot be imported ({error}): install ddpm_pipe[eval]."
        ) from error


# ---------------------------------------------------------------- distances of distributions


class _Given(nn.Module):
    """Takes the place of a metric's feature network, and returns the features that it is given."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """Compute the FID of features (n, D) and (m, D) (Heusel et al. 2017, eq. 6).

    It is the squared Frechet distance of the Gaussians with their means and covariances,
    ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^{1/2}), at least 0.
    """
    metric = import_torchmetrics("fid").FrechetInceptionDistance(_Given(generated.shape[1]), sync_on_compute=False)
    for features, real in ((generated, False), (reference, True)):
        for block in features.cpu().split(BLOCK):
            metric.update(block.double(), real=real)
    return max(0.0, metric.compute().item())  # for equal sets, rounding may make it negative


def kernel_distance(generated: Tensor, reference: Tensor, seed: int = 0) -> tuple[float, float]:
    """Compute the unbiased KID of features (n, D) and (m, D), and its standard error (Binkowski et al. 2018, sec. 3).

    The KID is the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, averaged over 100 random subsets
    of each set. A subset has 1000 features, or half as many as the smaller set where that is less. The scatter of the
    subsets gives the standard error (the delete-d jackknife of Shao and Wu 1989), as if both sets were as small as the
    smaller one.
    """
    poly_mmd = import_torchmetrics("kid").poly_mmd
    count = min(len(generated), len(reference))
    size = min(SUBSET_SIZE, count // 2)
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        rows = torch.randperm(len(features), generator=generator)[:size]
        return features[rows.to(features.device)].double()

    distances = torch.stack([poly_mmd(subset(reference), subset(generated)) for _ in range(SUBSETS)])
    scatter = distances.std(correction=0).item()
    return distances.mean().item(), scatter * math.sqrt(size / (count - size) + 1 / SUBSETS)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    """Compute exp E KL(p(y|x) || p(y)) from logits (n, K): mean and standard deviation over 10 parts.

    This is the Inception score (Salimans et al. 2016). The seed shuffles the images first, because generated images may
    be sorted by class.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        torch.manual_seed(seed)
        metric = import_torchmetrics("inception").InceptionScore(nn.Identity(), SPLITS, sync_on_compute=False)
        metric.update(logits.cpu().double())
        mean, std = metric.compute()
    return mean.item(), std.item()


# ---------------------------------------------------------------- manifolds


def precision_recall(
    generated: Tensor, reference: Tensor, neighbours: int = 3, block: int = BLOCK
) -> tuple[float, float]:
    """Compute precision and recall of features (n, D) and (m, D), in [0, 1] (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Precision is the share of generated images in the manifold of the reference: each lies as near to some reference
    image as that image's k-th nearest neighbour in the reference does. Recall is the same with the two sets exchanged.

    Args:
        generated, reference: features, more than `neighbours` in each.
        neighbours: k.
        block: how many features of each set are compared at a time; the result does not depend on it.
    """
    return (
        _share_within(generated, reference, neighbours, block),
        _share_within(reference, generated, neighbours, block),
    )


def _share_within(features: Tensor, manifold: Tensor, neighbours: int, block: int) -> float:
    """Return the share of `features` in a ball around some point of `manifold` that reaches its k-th neighbour."""
    radii = [
        # one more, because the nearest of all is the point itself
        _distances(rows, manifold, block).kthvalue(neighbours + 1).values
        for rows in manifold.split(block)
    ]
    within = [(_distances(rows, manifold, block) <= torch.cat(radii)).any(1) for rows in features.split(block)]
    return torch.cat(within).double().mean().item()


def _distances(rows: Tensor, features: Tensor, block: int) -> Tensor:
    """Compute the Euclidean distances of (n, D) and (m, D), float64 (n, m)."""
    return torch.cat([torch.cdist(rows.double(), part.double()) for part in features.split(block)], 1)


# ---------------------------------------------------------------- all of them


def evaluate_features(
    generated: Tensor,
    reference: Tensor,
    logits: Tensor | None = None,
    details: str = "unnamed features",
    network: str | None = None,
) -> list[Metric]:
    """Compute all metrics; with fewer than 50,000 generated images, each name has their number, as FID-5000.

    Args:
        generated: features of the generated images, (n, D), n at least 20.
        reference: features of the reference images, (m, D), m at least 20.
        logits: logits of the generated images, (n, K); without them there is no Inception score.
        details: text for the protocols: what computed the features, and how the images were drawn.
        network: name of a network other than Inception; the metrics' names include it, so that its numbers cannot pass
            for those of Inception.

    Returns:
        FID, KID, Inception score, precision and recall; a value that the features do not determine is nan or infinite.

    Raises:
        ValueError: where there are too few images, features of different sizes, or features that are not finite.
    """
    check_features("generated", generated)
    check_features("reference", reference)
    _check_alike(generated, reference, logits)
    images = f"{len(generated)} generated and {len(reference)} reference images"
    count = "" if len(generated) >= FULL_COUNT else f"-{len(generated)}"
    of_type, of_name = ("", "") if network is None else ("_of_other_features", f" of {network}")

    def metric(type: str, name: str, value: float, detail: str = "") -> Metric:
        protocol = ", ".join(filter(None, [images, detail, details]))
        return Metric(type + of_type, name + count + of_name, value, protocol)

    kid, kid_error = kernel_distance(generated, reference)
    metrics = [
        metric("fid", "FID", frechet_distance(generated, reference)),
        metric("kid", "KID", kid, f"standard error {kid_error:.2g}"),
    ]
    if logits is not None:
        score, score_std = inception_score(logits)
        metrics.append(metric("inception_score", "IS", score, f"standard deviation {score_std:.2g} of {SPLITS} parts"))
    manifolds = zip(("precision", "recall"), precision_recall(generated, reference), strict=True)
    return metrics + [metric(name, name, value, "3 nearest neighbours") for name, value in manifolds]


def check_features(name: str, features: Tensor) -> None:
    """Check that features can be measured; `name` is what the error message calls them.

    Raises:
        ValueError: where they are not (n, D) of at least `MIN_COUNT` images, or not finite.
    """
    if features.ndim != 2 or len(features) < MIN_COUNT:
        raise ValueError(
            f"{name} of shape {tuple(features.shape)} must be one line for each of at least {MIN_COUNT} images."
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite, and {int((~features.isfinite()).any(1).sum())} images are not.")


def _check_alike(generated: Tensor, reference: Tensor, logits: Tensor | None) -> None:
    if generated.shape[1] != reference.shape[1]:
        sizes = f"{generated.shape[1]} and {reference.shape[1]}"
        raise ValueError(f"generated and reference must be features of one size, not of {sizes}.")
    if logits is not None and len(logits) != len(generated):
        raise ValueError(f"logits must be of the {len(generated)} generated images, not of {len(logits)}.")
