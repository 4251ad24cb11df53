"""How good generated images are, by their features (n, D) beside those of reference images.

FID, KID and the Inception score are those of torchmetrics, in float64; it has no precision and recall.
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
"""Generated images from which on a metric needs no count in its name: it depends on how many there are."""

SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
BLOCK = 1000  # features that are worked on at a time


def import_torchmetrics(module: str) -> ModuleType:
    """A module of torchmetrics.image.

    Raises:
        ValueError: where it cannot be imported.
    """
    try:
        with torch_fidelity_importable():  # torchmetrics imports it where it is installed
            return import_module(f"torchmetrics.image.{module}")
    except Exception as error:  # of whatever kind: it tries many other packages
        raise ValueError(
            f"evaluation needs torchmetrics, which cannot be imported ({error}): install ddpm_pipe[eval]."
        ) from error


# ---------------------------------------------------------------- distances of distributions


class _Given(nn.Module):
    """Stands for the feature network of a metric that is given the features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """FID of features (n, D) and (m, D): of the Gaussians with their means and covariances (Heusel et al. 2017, eq. 6).

    ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^{1/2}), at least 0.
    """
    metric = import_torchmetrics("fid").FrechetInceptionDistance(_Given(generated.shape[1]), sync_on_compute=False)
    for features, real in ((generated, False), (reference, True)):
        for block in features.cpu().split(BLOCK):
            metric.update(block.double(), real=real)
    return max(0.0, metric.compute().item())  # of equal sets it is rounding, and may be negative


def kernel_distance(generated: Tensor, reference: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID of features (n, D) and (m, D), without bias, and its standard error (Binkowski et al. 2018, section 3).

    The squared maximum mean discrepancy of the kernel (x.y / D + 1)^3, a mean over 100 subsets of 1000 of each, or of
    half of the smaller set where that is less. How subsets scatter gives the error of the whole (the delete-d jackknife
    of Shao and Wu 1989), with the larger set taken to be as small as the other.
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
    """exp E KL(p(y|x) || p(y)) from logits (n, K): mean and standard deviation over 10 parts (Salimans et al. 2016).

    The images are shuffled by the seed first: generated ones may be sorted by class.
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
    """Precision and recall of features (n, D) and (m, D), both in [0, 1] (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Precision is the share of generated images that lie in the manifold of the reference: within the distance of its
    k-th nearest neighbour from some reference image. Recall is the same with the two exchanged.

    Args:
        generated, reference: features, more than `neighbours` of each.
        neighbours: k.
        block: how many features of a set are compared with how many of the other at a time; no matter for the result.
    """
    return (
        _share_within(generated, reference, neighbours, block),
        _share_within(reference, generated, neighbours, block),
    )


def _share_within(features: Tensor, manifold: Tensor, neighbours: int, block: int) -> float:
    """The share of `features` that lie in one of the balls around `manifold`."""
    radii = [
        # the nearest of all is the point itself
        _distances(rows, manifold, block).kthvalue(neighbours + 1).values
        for rows in manifold.split(block)
    ]
    within = [(_distances(rows, manifold, block) <= torch.cat(radii)).any(1) for rows in features.split(block)]
    return torch.cat(within).double().mean().item()


def _distances(rows: Tensor, features: Tensor, block: int) -> Tensor:
    """(n, D) and (m, D) -> (n, m)."""
    return torch.cat([torch.cdist(rows.double(), part.double()) for part in features.split(block)], 1)


# ---------------------------------------------------------------- all of them


def evaluate_features(
    generated: Tensor,
    reference: Tensor,
    logits: Tensor | None = None,
    details: str = "unnamed features",
    network: str | None = None,
) -> list[Metric]:
    """All metrics; of fewer than 50,000 generated images, their number is in the name: FID-5000.

    Args:
        generated: features of the generated images, (n, D), n at least 20.
        reference: features of the reference images, (m, D), m at least 20.
        logits: of the generated images, (n, K); without them there is no Inception score.
        details: for the protocols: what computed the features, and how the images were drawn.
        network: the name of the network where it is not Inception: no number of another may pass for an FID.

    Returns:
        FID, KID, Inception score, precision and recall; the value of one that these numbers do not have is nan or
        infinite.

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
    """Check that features can be measured; `name` is what they are of.

    Raises:
        ValueError: where they are not (n, D) of enough images, or not finite.
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
