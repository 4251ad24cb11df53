"""Convert a checkpoint of another project: `python examples/convert.py --source model-10.pt --output_dir out ...`."""

from ddpm_pipe.config import main
from ddpm_pipe.sharing.convert.command import convert
from ddpm_pipe.sharing.convert.config import ConvertConfig

if __name__ == "__main__":
    main(convert, ConvertConfig)
