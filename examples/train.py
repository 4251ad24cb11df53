"""Train a diffusion model: `accelerate launch examples/train.py [config.yaml] [--key value ...]`.

Without a config file it trains the small recipe of presets/fashion_mnist.yaml on the bundled images.
"""

import sys
from pathlib import Path

from ddpm_pipe.config import main
from ddpm_pipe.training.loop import TrainConfig, train

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.argv.insert(1, str(HERE / "presets" / "fashion_mnist.yaml"))
    main(train, TrainConfig, data=str(HERE / "fashion_mnist"))
