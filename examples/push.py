"""Share a run on the Hub: `python examples/push.py --run runs/mine --repo org/name [--public] [--dry-run]`."""

from ddpm_pipe.config import main
from ddpm_pipe.sharing.push import PushConfig, push

if __name__ == "__main__":
    main(push, PushConfig)
