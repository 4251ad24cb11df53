"""Rebuild averages of any length after training: `python examples/ema.py --run runs/mine --sigma-rel 0.05,0.10`."""

from ddpm_pipe.config import main
from ddpm_pipe.training.posthoc import PosthocConfig, write_posthoc_pipelines

if __name__ == "__main__":
    main(write_posthoc_pipelines, PosthocConfig)
