"""Draw images into a folder: `accelerate launch examples/generate.py --model id-or-folder --seeds 0-49999`."""

from ddpm_pipe.config import main
from ddpm_pipe.sampling.generate import GenerateConfig, generate

if __name__ == "__main__":
    main(generate, GenerateConfig)
