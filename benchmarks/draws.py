"""What the noise of a training step costs a process: `python benchmarks/draws.py`.

Prints a table for a global batch of 8,192 images: the GiB of noise that one of several processes draws for images of
256x256x3, and the seconds that all its draws take for images of 32x32x3, which is 1/64 of the numbers. Earlier versions
drew the noise of the whole batch in every process.
"""

from types import SimpleNamespace

import torch
from timing import DEVICE, interleaved, median, table

from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.draws import micro_batches
from ddpm_pipe.training.timestep_sampling import UniformSampler

BATCH, FULL, MEASURED = 8192, (3, 256, 256), (3, 32, 32)


def draw(processes: int) -> torch.Tensor:
    """Draw what the first of several processes needs for a step, and return its noise."""
    config = TrainConfig(data="none", batch_size=BATCH)
    process = SimpleNamespace(device=DEVICE, num_processes=processes, process_index=0)
    probabilities = UniformSampler(config.num_train_timesteps).probabilities()
    ((_, draws),) = micro_batches(config, process, probabilities, 0, MEASURED)
    return draws.eps


def measure(all_processes: tuple[int, ...] = (1, 8, 64), rounds: int = 5) -> None:
    jobs = {"whole batch": lambda: torch.randn(BATCH, *MEASURED, device=DEVICE)}
    jobs |= {str(processes): lambda processes=processes: draw(processes) for processes in all_processes}
    seconds = {name: median(times) for name, times in interleaved(jobs, rounds).items()}
    gib = torch.Size(FULL).numel() * BATCH * 4 / 2**30
    rows = [["any, earlier versions", f"{gib:.2f}", f"{seconds.pop('whole batch'):.3f}"]]
    rows += [[name, f"{gib / int(name):.2f}", f"{time:.3f}"] for name, time in seconds.items()]
    table(f"Draws of one process on {DEVICE}", ["processes", "GiB at 256x256", "seconds at 32x32"], rows)


if __name__ == "__main__":
    measure()
