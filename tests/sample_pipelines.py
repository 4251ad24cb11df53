"""Load pipelines in a process of its own and write the images they draw, or how loading ended.

`python sample_pipelines.py <job>`: a JSON file with `loader` (of `LOADERS`), `out` (a folder), and `pipelines`: name ->
{"source": folder or id, "load": keywords of from_pretrained, "call": keywords of the call}.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch

LOADERS = {
    "ddpm_pipe": ("ddpm_pipe", "DDPMPipeline"),
    "any": ("diffusers", "DiffusionPipeline"),
    "stock": ("diffusers", "DDPMPipeline"),
}


def main(job: dict) -> None:
    module, name = LOADERS[job["loader"]]
    loader = getattr(importlib.import_module(module), name)
    results = {"has_ddpm_pipe": importlib.util.find_spec("ddpm_pipe") is not None}
    for name, pipeline in job["pipelines"].items():
        try:
            loaded = loader.from_pretrained(pipeline["source"], **pipeline.get("load", {}))
            loaded.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"} | pipeline.get("call", {})
            images = loaded(generator=generator, **options).images
            np.save(Path(job["out"]) / f"{name}.npy", images)
            results[name] = [type(part).__module__ for part in (loaded, loaded.unet, loaded.scheduler)]
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    results["remote_code"] = [name for name in sys.modules if name.startswith("diffusers_modules.local")]
    (Path(job["out"]) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
