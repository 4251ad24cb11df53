"""Turn images into the features of a network, Inception or one in a file.

The features of a data set are cached, so that the next evaluation need not compute them.
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file
from torch import Tensor
from torch.export.passes import move_to_device_pass

from ddpm_pipe.launch import processes, to_device
from ddpm_pipe.run.files import CheckpointError, locked, replace_folder, save_tensors, sha256

logger = logging.getLogger(__name__)

Images = Callable[[range], Tensor]
"""Function from a range of n positions in a set of images to those images, uint8 (n, C, H, W), grey or RGB."""

BATCH_SIZE = 100
CACHE = Path(HF_HOME) / "ddpm_pipe" / "features"
FILE = "features.safetensors"
INSTEAD = "give another feature network with --features file.pt"


@dataclass
class FeatureNetwork:
    """A network that turns images into features.

    Attributes:
        module: uint8 RGB images (B, 3, H, W), 0 to 255, any B -> features (B, D), or features and logits (B, K); it
            resizes and normalises the images itself, and decides which sizes it accepts.
        name: the network's name in protocols.
        hash: changes whenever the features may change.
        device: where the weights are.
        file_name: name of the file that the network was read from; None for Inception.
    """

    module: Callable[[Tensor], Any]
    name: str
    hash: str
    device: str | torch.device = "cpu"
    file_name: str | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features (B, D) and logits (B, K) or None, float32 on the CPU, of uint8 images (B, 1 or 3, H, W).

        Raises:
            ValueError: where the images have another type or shape, or the network fails on them or returns anything
                else.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 (B, 1 or 3, H, W) to have features, not {images.dtype} {tuple(images.shape)}."
            )
        try:
            output = self.module(to_device(images, self.device).expand(-1, 3, -1, -1).contiguous())
        except (RuntimeError, AssertionError, ValueError) as error:  # an exported program asserts its guards
            *_, reason = str(error).strip().splitlines() or [type(error).__name__]
            shape = tuple(images.shape)
            raise ValueError(f"features={self.name!r} fails on images {shape}: {reason.rstrip('.')}.") from error
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        if len(parts) not in (1, 2) or any(getattr(part, "shape", ())[:-1] != (len(images),) for part in parts):
            raise ValueError(f"features={self.name!r} must return features (B, D), or features and logits (B, K).")
        features, logits = (*(part.float().cpu() for part in parts), None)[:2]
        return features, logits


# ---------------------------------------------------------------- networks


def load_features(features: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Load a feature network.

    Args:
        features: "inception", the Inception v3 of FID (Heusel et al. 2017) with 2048 features and 1008 logits, whose
            weights torch-fidelity downloads or finds in torch.hub's folder; or a file of TorchScript or of
            `torch.export.save` as `FeatureNetwork.module` describes. Such a file is a program that is run here: give
            only one that you trust.
        device: where the network computes.

    Raises:
        ValueError: where Inception or its weights cannot be obtained, or the file is of neither kind.
    """
    if features == "inception":
        return _load_inception(device)
    path = Path(features).expanduser()
    if not path.is_file():
        raise ValueError(f"features={features!r} is no file; {INSTEAD} (TorchScript or an exported program).")
    digest = sha256(path)
    name = f"{path.name} (sha256 {digest[:12]})"
    return FeatureNetwork(_read_module(path, device), name, digest, device, path.name)


@contextmanager
def torch_fidelity_importable() -> Iterator[None]:
    """Make the modules of torch-fidelity importable where the package itself cannot be imported.

    The package imports torchvision, for networks that are not used here. In that case its modules are removed from
    `sys.modules` afterwards, because other code would find a package with nothing in it.
    """
    spec = None
    try:
        import_module("torch_fidelity")
    except Exception:  # of any kind: a torchvision built for another torch raises several
        spec = find_spec("torch_fidelity")  # None where torch-fidelity is not installed
    if spec is not None:
        sys.modules["torch_fidelity"] = module_from_spec(spec)  # the package, whose __init__ is not run
    try:
        yield
    finally:
        if spec is not None:
            for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
                del sys.modules[name]


def _load_inception(device: str | torch.device) -> FeatureNetwork:
    try:
        with torch_fidelity_importable():
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            from torch_fidelity.version import __version__
    except Exception as error:  # of any kind, as above
        raise ValueError(
            f"features='inception' needs torch-fidelity, which cannot be imported ({error}): install it with "
            f"pip install --no-deps torch-fidelity, or {INSTEAD}."
        ) from error
    try:
        module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the weights of Inception cannot be downloaded or read ({error}); {INSTEAD}.") from error
    name = f"Inception v3 of torch-fidelity {__version__}"
    return FeatureNetwork(module.to(device), name, name, device)


def _read_module(path: Path, device: str | torch.device) -> torch.nn.Module:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        try:
            return move_to_device_pass(torch.export.load(path), device).module()  # also tensors that it creates
        except Exception as error:  # of any kind: each part of the zip file may fail in its own way
            raise ValueError(
                f"features={str(path)!r} is neither TorchScript (torch.jit.save) nor an exported program "
                "(torch.export.save)."
            ) from error


# ---------------------------------------------------------------- many images


def extract(
    network: FeatureNetwork, images: Images, count: int, batch_size: int = BATCH_SIZE
) -> tuple[Tensor, Tensor | None]:
    """Compute the features of many images, of which only one batch at a time is in memory.

    Each of P processes asks for every P-th batch, so `images` may also generate the images; every process gets all
    features. These take memory: 50,000 of 2048 numbers take 0.4 GB, and two or three times that while they are
    gathered.

    Args:
        network: computes the features.
        images: returns the images at a range of positions.
        count: number of images, at least 1.
        batch_size: number of images in a batch.

    Returns:
        Features (count, D) and logits (count, K) or None, in the order of the images, float32 on the CPU.

    Raises:
        ValueError: where there are no images, or the network cannot take them.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1 image.")
    state, parts = processes(), []
    for start in range(0, count, batch_size)[state.process_index :: state.num_processes]:
        parts.append((start, *network(images(range(start, min(start + batch_size, count))))))
    _, features, logits = zip(*sorted(gather_object(parts), key=itemgetter(0)), strict=True)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def reference_features(
    network: FeatureNetwork, images: Images, count: int, cache_dir: Path = CACHE, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Return the features of a data set, read from `cache_dir` where the same network has seen the same pixels before.

    The other arguments are those of `extract`. A damaged file of the cache is computed and written again.

    Returns:
        float32 (count, D), on the CPU.

    Raises:
        ValueError: where `extract` raises it.
    """
    state = processes()
    folder = Path(cache_dir) / _hash(network, images, count, batch_size) if state.is_main_process else None
    with nullcontext() if folder is None else _locked(folder):
        # the main process alone decides, because either all processes call `extract`, which gathers, or none does
        found = [None if folder is None else _read(folder / FILE)]
        broadcast_object_list(found)
        if found[0] is not None:
            return found[0]
        features, _ = extract(network, images, count, batch_size)
        if folder is not None:
            _write(folder, features)
    return features


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock an entry of the cache; another evaluation of the same data waits for this one and then reads the entry."""
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(f".{folder.name}.lock")
            stack.enter_context(locked(lock, "another evaluation computes the features of the same real images"))
        except OSError as error:  # nothing can be cached in such a folder, and `_write` says so
            logger.warning("the cache of features cannot be locked: %s", error)
        yield


def _hash(network: FeatureNetwork, images: Images, count: int, batch_size: int) -> str:
    digest = hashlib.sha256(network.hash.encode())
    for start in range(0, count, batch_size):
        batch = images(range(start, min(start + batch_size, count)))
        if start == 0:
            digest.update(str(tuple(batch.shape[1:])).encode())
        digest.update(batch.contiguous().numpy().data)
    return digest.hexdigest()


def _checksum(features: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(features.numpy().data).digest()), dtype=torch.uint8)


def _read(file: Path) -> Tensor | None:
    """Read the features in a file of the cache; return None where there is no file or its checksum does not match."""
    try:
        tensors = load_file(file)
        if torch.equal(_checksum(tensors["features"]), tensors["sha256"]):
            return tensors["features"]
    except FileNotFoundError:
        return None
    except (OSError, KeyError, safetensors.SafetensorError):
        pass
    logger.warning("%s is damaged; the features are computed again.", file)
    return None


def _write(folder: Path, features: Tensor) -> None:
    try:
        content = {"features": features, "sha256": _checksum(features)}
        replace_folder(folder, lambda new: save_tensors(new, {Path(FILE).stem: content}))
    except CheckpointError as error:  # without the file the next evaluation only takes longer
        logger.warning("the features of the data set are not kept: %s", error)
