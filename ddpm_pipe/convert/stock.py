"""Convert pipelines of diffusers, from a folder or the Hub, to pipelines of this package.

A stock DDPM or DDIM pipeline gets the schedulers of this package. Its weights may be pickled, as those of google/ddpm-*
are: `DDPMPipeline.from_pretrained` refuses such files, and this module reads them as plain tensors.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ddpm_pipe.pretrained import DDPMPipeline, read_index
from ddpm_pipe.samplers import OWN_SCHEDULERS
from ddpm_pipe.weights import STEM, from_config, load_network, part_folder, weight_files


def _fetch(source: str) -> Path:
    """Download the configs and weights of a repository; pickled weights are downloaded only where it has no others.

    Returns:
        The folder of the cache that holds them.

    Raises:
        ValueError: where the Hub does not give them, saying why.
    """
    try:
        for suffix in ("safetensors", "bin"):
            patterns = ["*.json", f"{STEM}*.{suffix}", f"unet/{STEM}*.{suffix}"]
            folder = Path(snapshot_download(source, allow_patterns=patterns))
            if weight_files(part_folder(folder, "unet"), suffix=suffix):
                break
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"source={source!r} is no file or folder here, and the Hub does not give it: {reason}"
        ) from error
    return folder


def pipeline(source: str) -> DDPMPipeline:
    """Make the pipeline of a folder or of a repository on the Hub.

    Args:
        source: path of the folder or id of the repository. It may hold any pipeline of this package, or one of
            diffusers with a DDPM or DDIM scheduler.

    Raises:
        ValueError: where the source is neither, or does not hold such a pipeline; the message names it.
    """
    folder = Path(source) if Path(source).is_dir() else _fetch(source)
    network_class, scheduler_class = read_index(folder)
    if scheduler_class not in OWN_SCHEDULERS.values():
        raise ValueError(
            f"source={source!r} has a {scheduler_class.__name__}; with {' or '.join(OWN_SCHEDULERS)} it can be "
            "converted."
        )
    part = part_folder(folder, "unet")
    suffix = "bin" if weight_files(part, suffix="bin") and not weight_files(part) else "safetensors"
    network = load_network(network_class, part, suffix=suffix)
    scheduler = from_config(scheduler_class, part_folder(folder, "scheduler") / scheduler_class.config_name)
    return DDPMPipeline(network, scheduler)
