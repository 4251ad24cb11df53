"""Metrics against closed forms, scipy, torch-fidelity and sets with known answers; what is refused; a real network."""

import math
import sys

import pytest
import torch
from accelerate import PartialState
from conftest import one_sentence
from feature_network import BUNDLED, accuracy, feature_file, torch_fidelity  # noqa: F401
from scipy.linalg import sqrtm
from torch import Tensor
from torch.testing import assert_close

from ddpm_pipe.data.memory import load_images
from ddpm_pipe.evaluation import metrics
from ddpm_pipe.evaluation.features import extract, load_features
from ddpm_pipe.evaluation.metrics import (
    FULL_COUNT,
    evaluate_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(count: int, mean: Tensor, root: Tensor) -> Tensor:
    """Features (count, D) whose mean is `mean` and whose covariance is root.T @ root, to rounding."""
    features = draw(count, len(mean), seed=count)
    q, _ = torch.linalg.qr(features - features.mean(0))  # columns: orthonormal, and orthogonal to ones
    return mean + q * math.sqrt(count - 1) @ root


# ---------------------------------------------------------------- Frechet distance


@pytest.mark.parametrize("s1, s2", [(1.0, 1.0), (0.5, 3.0), (1e-3, 1e2)])
def test_frechet_distance_of_isotropic_gaussians(s1, s2):
    size = 8
    mean1, mean2, one = draw(size), draw(size, seed=1), torch.eye(size, dtype=torch.float64)
    first, second = with_moments(100, mean1, s1 * one), with_moments(70, mean2, s2 * one)
    expected = ((mean1 - mean2) ** 2).sum() + size * (s1 - s2) ** 2
    assert_close(frechet_distance(first, second), expected.item(), rtol=1e-9, atol=1e-9)


def test_frechet_distance_of_gaussians_with_common_axes():
    """Commuting covariances: the distance of the standard deviations along each axis."""
    axes, _ = torch.linalg.qr(draw(6, 6))
    s1, s2 = draw(6, seed=1).abs(), draw(6, seed=2).abs()
    zero = torch.zeros(6, dtype=torch.float64)
    first, second = with_moments(50, zero, s1[:, None] * axes), with_moments(50, zero, s2[:, None] * axes)
    assert_close(frechet_distance(first, second), ((s1 - s2) ** 2).sum().item(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("counts", [(500, 300), (40, 30), (40, 300), (20, 20)], ids=str)
@pytest.mark.parametrize("offset", [0, 100])
def test_frechet_distance_is_that_of_scipy(counts, offset):
    """Also of covariances without full rank, fewer images than features, and of features far from zero."""
    size = 64
    first, second = (draw(n, size, seed=n) @ draw(size, size, seed=3) / 8 + offset for n in counts)
    covariance1, covariance2 = torch.cov(first.T), torch.cov((second := second + 0.3).T)
    root = sqrtm((covariance1 @ covariance2).numpy())
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + torch.trace(covariance1 + covariance2)
    expected = expected.item() - 2 * root.trace().real
    assert_close(frechet_distance(first, second), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [20, 64, 1000, 2500])  # the last in several blocks
def test_frechet_distance_of_a_set_with_itself_is_zero(count):
    features = draw(count, 64).float()
    distance = frechet_distance(features, features)
    assert 0 <= distance < 1e-5


def test_frechet_distance_of_float32_features_is_computed_in_float64():
    features = draw(500, 16).float() + 1000  # in float32, mean and covariance would lose all digits
    assert_close(frechet_distance(features, features + 1), 16.0, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- KID


def exact_kernel_distance(first: Tensor, second: Tensor) -> float:
    """Of whole sets of one size, pair by pair."""
    n, size = first.shape
    kernel = [[[((x @ y) / size + 1) ** 3 for y in b] for x in a] for a, b in ((first, first), (second, second))]
    across = sum(((x @ y) / size + 1) ** 3 for x in first for y in second)
    within = sum(row[j] for table in kernel for i, row in enumerate(table) for j in range(n) if i != j)
    return (within / (n * (n - 1)) - 2 * across / n**2).item()


def test_kernel_distance_of_constant_sets_is_a_closed_form():
    """k(x, x) + k(y, y) - 2 k(x, y)."""
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    value, error = kernel_distance(x.expand(50, 2), y.expand(60, 2))
    assert_close(value, (5 / 2 + 1) ** 3 + (10 / 2 + 1) ** 3 - 2 * (1 / 2 + 1) ** 3)
    assert error < 1e-9


def test_kernel_distance_is_the_mean_over_subsets(monkeypatch):
    """Subsets of two out of four: the mean over many is that of the whole set, without bias."""
    first, second = draw(4, 3), draw(4, 3, seed=1)
    monkeypatch.setattr(metrics, "SUBSETS", 20_000)
    value, _ = kernel_distance(first, second)
    assert value == pytest.approx(exact_kernel_distance(first, second), abs=0.15)


def test_kernel_distance_has_no_bias_and_its_standard_error_is_right():
    """Over many pairs of sets of one distribution, and of two that differ by a shift."""
    for shift, expected in ((0.0, 0.0), (0.5, None)):
        runs = [kernel_distance(draw(100, 8, seed=2 * i), draw(100, 8, seed=2 * i + 1) + shift) for i in range(60)]
        values, errors = torch.tensor(runs, dtype=torch.float64).T
        spread = values.std()
        if expected is not None:
            assert abs(values.mean() - expected) < 3 * spread / math.sqrt(len(runs))
        assert 0.7 < errors.mean() / spread < 2.5


def test_kernel_distance_of_gaussians_is_a_closed_form():
    """E (x.y / D + 1)^3 of independent x, y is 1 + 3 E(x.y)/D + 3 E(x.y)^2/D^2 + E(x.y)^3/D^3, here with D = 1."""
    mean = 0.5
    first, second = draw(5000, 1), draw(5000, 1, seed=1) + mean
    moments1, moments2 = (1.0, 0.0, 1.0, 0.0), (1.0, mean, 1 + mean**2, mean**3 + 3 * mean)  # E x^k

    def expectation(a, b):
        return sum(math.comb(3, k) * a[k] * b[k] for k in range(4))

    expected = expectation(moments1, moments1) + expectation(moments2, moments2) - 2 * expectation(moments1, moments2)
    value, error = kernel_distance(first, second)
    assert abs(value - expected) < 3 * error < 0.5 * expected


# ---------------------------------------------------------------- Inception score


def test_inception_score_of_equal_predictions_is_one():
    assert_close(inception_score(draw(10).expand(200, 10)), (1.0, 0.0))


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("confidence", [50.0, 600.0])  # in float32, e^-600 is 0 and its logarithm infinite
def test_inception_score_of_confident_balanced_predictions_is_the_number_of_classes(monkeypatch, classes, confidence):
    monkeypatch.setattr(metrics, "SPLITS", 1)  # in each of several parts the classes are balanced only by chance
    logits = confidence * torch.eye(classes, classes + 1).repeat(100, 1)  # and one class that no image is of
    with pytest.warns(UserWarning, match="degrees of freedom"):  # one part has no standard deviation
        mean, _ = inception_score(logits)
    assert_close(mean, float(classes))


def test_inception_score_of_sorted_classes_is_not_that_of_its_parts():
    logits = 50 * torch.eye(10).repeat_interleave(100, 0)
    assert inception_score(logits)[0] > 9


def test_inception_score_and_the_random_numbers_of_others_do_not_mix():
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    score = inception_score(draw(100, 5))
    assert torch.equal(torch.rand(1), first)
    assert inception_score(draw(100, 5)) == score


# ---------------------------------------------------------------- precision and recall

SQUARE = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])


@pytest.mark.parametrize(
    "generated, reference, expected",
    [
        (SQUARE, SQUARE, (1, 1)),
        (SQUARE, SQUARE + 100, (0, 0)),
        # half of what is generated lies in one of two real clusters
        (torch.cat([SQUARE, SQUARE - 100]), torch.cat([SQUARE, SQUARE + 100]), (0.5, 0.5)),
        # one mode of two: nothing wrong, half missing
        (SQUARE, torch.cat([SQUARE, SQUARE + 100]), (1, 0.5)),
        # all modes and noise: half wrong, nothing missing
        (torch.cat([SQUARE, SQUARE + 100]), SQUARE, (0.5, 1)),
    ],
    ids=["same", "apart", "half", "dropped mode", "invented mode"],
)
def test_precision_and_recall_of_clusters(generated, reference, expected):
    assert precision_recall(generated, reference) == expected


@pytest.mark.parametrize("k, expected", [(1, 0), (2, 0), (3, 1)])
def test_a_ball_reaches_to_the_kth_neighbour(k, expected):
    """Of 0, 1, 3 and 6 the ball around the last reaches to 9, 11 and 12; no other goes farther."""
    reference = torch.tensor([[0.0], [1], [3], [6]])
    generated = torch.tensor([[11.5]] * 4)
    assert precision_recall(generated, reference, neighbours=k)[0] == expected


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_blocks_are_no_matter(block):
    generated, reference = draw(90, 5), draw(120, 5, seed=1) + 0.5
    assert precision_recall(generated, reference, block=block) == precision_recall(generated, reference)


# ---------------------------------------------------------------- torch-fidelity


def test_metrics_are_those_of_torch_fidelity(torch_fidelity):  # noqa: F811
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, reference = draw(2000, 32).float().relu(), draw(2400, 32, seed=1).float().relu() * 1.1
    statistics = [fid_features_to_statistics(features.double()) for features in (generated, reference)]
    (fid,) = fid_statistics_to_metric(*statistics, verbose=False).values()
    assert_close(frechet_distance(generated, reference), fid, rtol=1e-9, atol=0)

    kid = kid_features_to_metric(generated, reference, verbose=False)["kernel_inception_distance_mean"]
    value, error = kernel_distance(generated, reference)
    assert abs(value - kid) < 1.5 * error  # other subsets

    logits = 3 * draw(2000, 10, seed=2)
    score = isc_features_to_metric(logits)
    mean, std = inception_score(logits)
    assert_close(mean, score["inception_score_mean"], rtol=0.01, atol=0)  # other parts
    assert 0.3 < std / score["inception_score_std"] < 3

    prc = prc_features_to_metric(generated, reference, verbose=False)
    assert_close(precision_recall(generated, reference), (prc["precision"], prc["recall"]), rtol=0, atol=1e-3)


# ---------------------------------------------------------------- the table


def test_metrics_are_what_evaluation_json_holds():
    metrics = evaluate_features(draw(30, 4), draw(50, 4), draw(30, 7), "some network")
    assert [(metric.type, metric.name) for metric in metrics] == [
        ("fid", "FID-30"),
        ("kid", "KID-30"),
        ("inception_score", "IS-30"),
        ("precision", "precision-30"),
        ("recall", "recall-30"),
    ]
    rows = [metric.to_json() for metric in metrics]
    assert all(list(row) == ["type", "name", "value", "protocol"] and math.isfinite(row["value"]) for row in rows)
    assert rows[0]["protocol"] == "30 generated and 50 reference images, some network"
    assert "standard error" in rows[1]["protocol"] and "3 nearest neighbours" in rows[3]["protocol"]


def test_no_metric_of_another_network_passes_for_an_fid():
    metrics = evaluate_features(draw(30, 4), draw(50, 4), network="own.pt")
    assert (metrics[0].type, metrics[0].name) == ("fid_of_other_features", "FID-30 of own.pt")
    assert all("_of_other_features" in metric.type and " of own.pt" in metric.name for metric in metrics)


def test_without_logits_there_is_no_inception_score():
    types = [metric.type for metric in evaluate_features(draw(30, 4), draw(50, 4))]
    assert types == ["fid", "kid", "precision", "recall"]


@pytest.mark.parametrize("count, name", [(FULL_COUNT - 1, "FID-49999"), (FULL_COUNT, "FID"), (FULL_COUNT + 1, "FID")])
def test_only_of_50000_images_or_more_is_it_the_fid(monkeypatch, count, name):
    monkeypatch.setattr(metrics, "precision_recall", lambda *_: (1.0, 1.0))  # minutes
    fid, kid, *_ = evaluate_features(draw(count, 2), draw(60_000, 2))
    assert (fid.name, kid.name) == (name, name.replace("FID", "KID"))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"generated": draw(19, 4)}, r"generated of shape \(19, 4\) must be one line for each of at least 20 images"),
        ({"reference": draw(1, 4)}, r"reference of shape \(1, 4\) must be one line for each of at least 20 images"),
        ({"generated": draw(30)}, r"generated of shape \(30,\) must be one line"),
        ({"reference": draw(30, 5)}, "generated and reference must be features of one size, not of 4 and 5"),
        ({"logits": draw(29, 5)}, "logits must be of the 30 generated images, not of 29"),
        ({"reference": draw(30, 4) / torch.tensor([1, 0, 1, 1])}, "reference must be finite, and 30 images are not"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_sentence(change, sentence):
    given = {"generated": draw(30, 4), "reference": draw(40, 4), "logits": draw(30, 6)} | change
    with one_sentence(match=f"^{sentence}[^\n]*$"):
        evaluate_features(**given)


def test_without_torchmetrics_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"^evaluation needs torchmetrics, .*: install ddpm_pipe\[eval\]\.$"):
        frechet_distance(draw(30, 4), draw(30, 4))


# ---------------------------------------------------------------- a real network


@pytest.mark.slow
def test_a_network_trained_on_the_bundled_images_knows_good_images_from_bad(feature_file, fresh_accelerate):  # noqa: F811
    network = load_features(feature_file)
    assert accuracy(network.module) > 0.85
    train, test = (load_images(BUNDLED, split, with_labels=True) for split in ("train", "test"))
    some = train.images[::5]  # 2000 of all classes
    noise = torch.randn(test.images.shape, generator=torch.Generator().manual_seed(0))

    def of(images: Tensor) -> tuple[Tensor, Tensor | None]:
        return extract(network, lambda rows: images[rows.start : rows.stop], len(images))

    reference, _ = of(some)
    results = {}
    for level in (0, 20, 60):
        noisy = (test.images + level * noise).clamp(0, 255).byte()
        found = evaluate_features(of(noisy)[0], reference, of(noisy)[1])
        results[level] = {metric.type: metric.value for metric in found}
    for better, worse in ((0, 20), (20, 60)):
        for metric in ("fid", "kid"):
            assert results[better][metric] < results[worse][metric], results
        for metric in ("inception_score", "precision"):
            assert results[better][metric] > results[worse][metric], results
    one_class = of(test.images[test.labels == 5])[0]
    precision, recall = precision_recall(one_class, reference)
    assert precision > 0.6 and recall < 0.5 < results[0]["recall"], (precision, recall, results)
    assert PartialState().num_processes == 1


def test_a_metric_that_is_not_a_number_stands_beside_the_others():
    features = draw(40, 4) * 1e60  # the kernel takes the sixth power
    found = evaluate_features(features, features + 1, torch.full((40, 2), math.nan))
    assert [metric.type for metric in found if not math.isfinite(metric.value)] == ["kid", "inception_score"]
