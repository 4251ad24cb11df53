"""Train a diffusion model: `accelerate launch examples/train.py [preset or config.yaml] [--key value ...]`.

Without a config it trains the preset fashion_mnist on the bundled images. It is `ddpm-pipe train` with their folder as
the default of `--data`.
"""

import sys
from pathlib import Path

from ddpm_pipe.cli import main

if __name__ == "__main__":
    argv = sys.argv[1:]
    if not argv or argv[0].startswith("--"):
        argv = ["fashion_mnist", *argv]
    main(["train", *argv], data=str(Path(__file__).resolve().parent / "fashion_mnist"))
