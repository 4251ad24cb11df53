"""Feature networks from files; many images in batches and processes; the cache of a data set's features.

As a program, one of the processes of a test: `torchrun tests/test_features.py NETWORK FOLDER`.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pypi
import pytest
import torch
from conftest import one_sentence
from feature_network import torch_fidelity  # noqa: F401
from torch import Tensor, nn

from ddpm_pipe.evaluation.config import EvaluateConfig
from ddpm_pipe.evaluation.features import FILE, FeatureNetwork, extract, load_features, reference_features
from ddpm_pipe.evaluation.metrics import frechet_distance
from ddpm_pipe.launch import leave

COUNT, SIZE = 23, 12  # not a multiple of any batch size below
PIXELS = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Small(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, 5) and logits (B, 2), or the features alone."""

    def __init__(self, with_logits: bool = True):
        super().__init__()
        self.layer, self.head, self.with_logits = nn.Conv2d(3, 5, 3), nn.Linear(5, 2), with_logits

    def forward(self, images):
        features = self.layer(images.float() / 255).mean((2, 3))
        return (features, self.head(features)) if self.with_logits else features


class Counted:
    """A feature network that remembers how many images it saw."""

    def __init__(self, network: nn.Module):
        self.network, self.seen = network, 0

    def __call__(self, images: Tensor):
        self.seen += len(images)
        return self.network(images)


def small(with_logits: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Small(with_logits).eval()


def images(positions: range) -> Tensor:
    return PIXELS[positions.start : positions.stop]


def save(network: nn.Module, form: str, path: Path) -> str:
    if form == "TorchScript":
        # a trace: scripting wants one type of output
        torch.jit.trace(network, PIXELS[:2]).save(str(path))
    else:
        batch = {"images": {0: torch.export.Dim("batch")}}
        torch.export.save(torch.export.export(network, (PIXELS[:2],), dynamic_shapes=batch), path)
    return str(path)


@pytest.fixture
def counted(fresh_accelerate) -> Counted:
    return Counted(small())


@pytest.fixture
def network(counted) -> FeatureNetwork:
    return FeatureNetwork(counted, "small", "hash of small")


# ---------------------------------------------------------------- networks


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("form", ["TorchScript", "exported"])
def test_file_gives_the_features_of_the_network_it_was_made_of(tmp_path, form, with_logits):
    original = small(with_logits)
    features, logits = load_features(save(original, form, tmp_path / "net.pt"))(PIXELS)
    expected = original(PIXELS)
    torch.testing.assert_close(features, expected[0] if with_logits else expected)
    assert not features.requires_grad
    if with_logits:
        torch.testing.assert_close(logits, expected[1])
    else:
        assert logits is None


def test_hash_is_of_the_content_and_not_of_the_name(tmp_path):
    first, copy, other = (tmp_path / name for name in ("first.pt", "copy.pt", "other.pt"))
    save(small(), "TorchScript", first)
    copy.write_bytes(first.read_bytes())
    save(small(with_logits=False), "TorchScript", other)
    one, same, different = (load_features(str(path)) for path in (first, copy, other))
    assert one.hash == same.hash != different.hash
    assert one.name.startswith("first.pt (sha256 ")


def test_grey_is_repeated_to_rgb(network):
    grey = PIXELS[:, :1]
    torch.testing.assert_close(network(grey)[0], network(grey.repeat(1, 3, 1, 1))[0])


def test_half_precision_features_become_float32():
    network = FeatureNetwork(lambda images: images.half().mean((2, 3)), "half", "")
    assert network(PIXELS)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "bad", [PIXELS.float(), PIXELS[0], PIXELS.repeat(1, 2, 1, 1)[:, :4]], ids=["float", "3-D", "RGBA"]
)
def test_other_images_end_in_one_sentence(network, bad):
    with one_sentence(match=r"^images must be uint8 \(B, 1 or 3, H, W\) to have features, not"):
        network(bad)


@pytest.mark.parametrize(
    "output", [lambda x: x, lambda x: "text", lambda x: x.flatten(1)[:1], lambda x: (x.flatten(1),) * 3]
)
def test_network_that_returns_something_else_ends_in_one_sentence(output):
    with one_sentence(match=r"features='odd' must return features \(B, D\), or features and logits"):
        FeatureNetwork(output, "odd", "")(PIXELS)


def test_images_of_a_size_that_the_network_does_not_take_end_in_one_sentence(network):
    with one_sentence(match=r"features='small' fails on images \(23, 3, 2, 2\): "):
        network(PIXELS[:, :, :2, :2])


class Centred(torch.nn.Module):
    """Features of a program that makes a tensor by itself, on the device where it was exported."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) - torch.arange(3)


def test_all_of_an_exported_program_moves_to_the_device(tmp_path):
    torch.export.save(torch.export.export(Centred(), (PIXELS[:2],)), tmp_path / "centred.pt2")
    moved = load_features(str(tmp_path / "centred.pt2"), "meta").module
    assert moved(PIXELS[:2].to("meta")).device.type == "meta"
    assert {str(node.kwargs["device"]) for node in moved.graph.nodes if "device" in node.kwargs} == {"meta"}


def test_exported_program_of_one_batch_size_says_so(tmp_path):
    torch.export.save(torch.export.export(small(), (PIXELS[:2],)), tmp_path / "fixed.pt2")
    with pytest.raises(ValueError, match=r"fixed.pt2.* fails on images \(3, 3, 12, 12\): "):
        load_features(str(tmp_path / "fixed.pt2"))(PIXELS[:3])


@pytest.mark.parametrize("content", ["text", "state dict", "missing"])
def test_other_files_end_in_one_sentence(tmp_path, content):
    path = tmp_path / "other.pt"
    if content == "text":
        path.write_text("not a network")
    elif content == "state dict":
        torch.save(small().state_dict(), path)
    what = "is no file; give another" if content == "missing" else "is neither TorchScript"
    with one_sentence(match=f"^features='.*other.pt' {what}[^\n]*$"):
        load_features(str(path))


# ---------------------------------------------------------------- Inception

OFFERED = r"give another feature network with --features file\.pt\.$"


def test_without_torch_fidelity_a_file_is_offered(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=f"^features='inception' needs torch-fidelity, .* or {OFFERED}"):
        load_features("inception")


@pytest.mark.slow
def test_without_its_weights_a_file_is_offered(torch_fidelity, monkeypatch):  # noqa: F811
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(module, "load_state_dict_from_url", unreachable)
    reason = r"^the weights of Inception cannot be downloaded or read \(no route to host\)"
    with pytest.raises(ValueError, match=f"{reason}; {OFFERED}"):
        load_features("inception")


@pytest.mark.slow
def test_inception_is_found_in_the_folder_of_torch_hub(torch_fidelity, monkeypatch, tmp_path):  # noqa: F811
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:  # random weights, in place of the real ones
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        original = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(original.state_dict(), tmp_path / "checkpoints" / Path(module.URL_INCEPTION_V3).name)

    inception = load_features("inception")
    assert inception.name == inception.hash == "Inception v3 of torch-fidelity 0.4.0"
    features, logits = extract(inception, images, 3, batch_size=2)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    torch.testing.assert_close(features, original(PIXELS[:3])[0])


WITHOUT_TORCHVISION = """
import sys
import torch
from ddpm_pipe.evaluation.features import load_features
from ddpm_pipe.evaluation.metrics import frechet_distance
sys.modules["torchvision"] = None  # it cannot be imported
torch.hub.load_state_dict_from_url = lambda *_, **__: {}
features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
print(frechet_distance(features, features + 1))
torch.nn.Module.load_state_dict = lambda *_: None
print(load_features("inception").name)
print([name for name in sys.modules if name.startswith("torch_fidelity")])
"""


@pytest.mark.slow
def test_inception_and_the_metrics_need_no_torchvision(tmp_path_factory, repo):
    folder = pypi.unpacked("torch-fidelity", "0.4.0", tmp_path_factory.getbasetemp())
    environment = os.environ | {"PYTHONPATH": f"{repo}{os.pathsep}{folder}"}
    command = [sys.executable, "-c", WITHOUT_TORCHVISION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    distance, name, left = done.stdout.splitlines()
    assert float(distance) == pytest.approx(4, rel=1e-4) and name == "Inception v3 of torch-fidelity 0.4.0"
    assert left == "[]"  # others get the error of the import, and no package with nothing in it


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "AttributeError"])
def test_a_torchvision_that_cannot_be_imported_is_no_matter_to_the_metrics(tmp_path, repo, error):
    """A package in the place of torch-fidelity, which torchmetrics imports wherever it is installed."""
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text(f"from torch_fidelity import helpers\nraise {error}('no torchvision')\n")
    (package / "helpers.py").write_text("vassert = None\n")
    (package / "feature_extractor_inceptionv3.py").write_text("FeatureExtractorInceptionV3 = object\n")
    (package / "interpolate_compat_tensorflow.py").write_text("interpolate_bilinear_2d_like_tensorflow1x = None\n")
    program = """
import sys
import feature_network  # the network of these tests, which imports torchmetrics
from ddpm_pipe.evaluation.metrics import inception_score
import torch
print(inception_score(torch.zeros(30, 4)))
print([name for name in sys.modules if name.startswith("torch_fidelity")])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (repo, repo / "tests", tmp_path)))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1.0, 0.0)", "[]"]


def test_help_says_that_a_file_of_features_is_a_program():
    assert "a program that is run" in EvaluateConfig.model_fields["features"].description


# ---------------------------------------------------------------- many images


@pytest.mark.parametrize("batch_size", [1, 4, COUNT, 100])
def test_batches_give_the_same_as_all_at_once(network, batch_size):
    for part, whole in zip(extract(network, images, COUNT, batch_size), network(PIXELS), strict=True):
        torch.testing.assert_close(part, whole)


def test_no_more_than_a_batch_is_asked_for(network):
    asked = []

    def some(positions: range) -> Tensor:
        asked.append(positions)
        return images(positions)

    extract(network, some, COUNT, 10)
    assert asked == [range(0, 10), range(10, 20), range(20, 23)]


def test_no_images_end_in_one_sentence(network):
    with one_sentence(match="count=0 must be at least 1 image"):
        extract(network, images, 0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [COUNT, 3], ids=["several batches each", "a process without a batch"])
def test_processes_share_the_work_and_get_the_same(tmp_path, network, count):
    save(small(), "TorchScript", tmp_path / "net.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "net.pt"), str(tmp_path), str(count)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    features, logits = extract(network, images, count, batch_size=4)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        torch.testing.assert_close(rank["features"], features, rtol=0, atol=0)
        torch.testing.assert_close(rank["logits"], logits, rtol=0, atol=0)
        torch.testing.assert_close(rank["reference"], features, rtol=0, atol=0)
        torch.testing.assert_close(rank["cached"], features, rtol=0, atol=0)
    assert ranks[0]["distance"] == frechet_distance(features, features + 1)
    assert [rank["asked"] for rank in ranks] == [sorted(range(0, count, 4))[rank::2] for rank in (0, 1)]


def take_part(file: str, folder: str, count: int) -> None:
    """What one process of the test above does."""
    network, asked = load_features(file), []

    def some(positions: range) -> Tensor:
        asked.append(positions.start)
        return images(positions)

    features, logits = extract(network, some, count, batch_size=4)
    result = {"features": features, "logits": logits, "asked": list(asked)}
    for name in ("reference", "cached"):
        result[name] = reference_features(network, images, count, Path(folder) / "cache", batch_size=4)
    if os.environ["RANK"] == "0":  # a metric of one process does not wait for the others
        result["distance"] = frechet_distance(features, features + 1)
    torch.save(result, Path(folder) / f"{os.environ['RANK']}.pt")


# ---------------------------------------------------------------- the cache


def test_features_of_a_data_set_are_computed_once(network, counted, tmp_path):
    first = reference_features(network, images, COUNT, tmp_path)
    assert counted.seen == COUNT
    again = reference_features(network, images, COUNT, tmp_path, batch_size=7)
    assert counted.seen == COUNT
    assert torch.equal(first, again) and torch.equal(first, extract(network, images, COUNT)[0])


def test_another_network_or_other_images_have_an_entry_of_their_own(network, counted, tmp_path):
    def one_bit_changed(positions: range) -> Tensor:
        pixels = images(positions).clone()
        pixels[0, 0, 0, 0] ^= 1
        return pixels

    def other_shape(positions: range) -> Tensor:
        return images(positions).view(-1, 3, 9, 16)

    reference_features(network, images, COUNT, tmp_path)
    reference_features(network, one_bit_changed, COUNT, tmp_path)
    reference_features(network, other_shape, COUNT, tmp_path)
    reference_features(network, images, COUNT - 1, tmp_path)
    reference_features(FeatureNetwork(counted, "small", "another hash"), images, COUNT, tmp_path)
    assert counted.seen == 5 * COUNT - 1
    assert len(list(tmp_path.glob("[!.]*"))) == 5


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty", "other content"])
def test_damaged_file_is_computed_again(network, counted, tmp_path, caplog, damage):
    first = reference_features(network, images, COUNT, tmp_path)
    (file,) = tmp_path.glob(f"*/{FILE}")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    cases = {"cut": content[:-40], "one bit": content, "empty": b"", "other content": b"x" * 500}
    file.write_bytes(cases[damage])
    assert torch.equal(reference_features(network, images, COUNT, tmp_path), first)
    assert counted.seen == 2 * COUNT and "is damaged" in caplog.text
    reference_features(network, images, COUNT, tmp_path)
    assert counted.seen == 2 * COUNT


def test_killed_writer_leaves_no_entry(network, counted, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_pipe.evaluation.features.save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            reference_features(network, images, COUNT, tmp_path)
    assert not list(tmp_path.glob(f"[!.]*/{FILE}"))
    reference_features(network, images, COUNT, tmp_path)
    assert counted.seen == 2 * COUNT and len(list(tmp_path.glob("[!.]*"))) == 1


def test_full_disk_costs_the_entry_and_not_the_evaluation(network, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("ddpm_pipe.evaluation.features.save_tensors", full)
    assert len(reference_features(network, images, COUNT, tmp_path)) == COUNT
    assert "are not kept" in caplog.text and not list(tmp_path.glob("[!.]*"))


def test_a_second_evaluation_waits_for_the_features_of_the_first(network, counted, tmp_path, caplog):
    """Both start at once, the second while the first computes; in the end the data went through the network once."""
    first_computes, second = threading.Event(), []

    def slowly(positions: range) -> Tensor:
        if counted.seen:
            first_computes.set()
            time.sleep(0.05)
        return images(positions)

    thread = threading.Thread(
        target=lambda: first_computes.wait(60) and second.append(reference_features(network, images, COUNT, tmp_path))
    )
    thread.start()
    first = reference_features(network, slowly, COUNT, tmp_path, batch_size=3)
    thread.join(60)
    assert torch.equal(second[0], first) and counted.seen == COUNT
    told = "another evaluation computes the features of the same real images; this one waits for it."
    assert caplog.messages == [told]
    reference_features(network, images, COUNT, tmp_path)  # nobody is waited for
    assert caplog.messages == [told]


if __name__ == "__main__":
    take_part(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    leave()
