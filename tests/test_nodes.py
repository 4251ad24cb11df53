"""Two machines with disks of their own, played by two launchers with working folders of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import REPO, assert_same, final_state, write_config

from ddpm_pipe.run.folder import Run
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.loop import train

pytestmark = pytest.mark.slow
SAVING = {"save_every": 2, "sample_every": 0, "ema_sigma_rel": []}


def start(folder: Path, node: int, port: int, config: TrainConfig, *flags: str) -> subprocess.Popen:
    """The launcher of one machine, with a relative output_dir: each has a run folder of its own."""
    elastic = ("--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1", "--master_addr", "127.0.0.1")
    file = write_config(config.replace(output_dir=str(folder / "node")))
    command = [sys.executable, "-m", "torch.distributed.run", *elastic, "--master_port", str(port)]
    command += ["-m", "ddpm_pipe", "train", file, "--output_dir", "run", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def launch_nodes(folders: list[Path], configs: list[TrainConfig], *flags: str) -> list[tuple[int, str]]:
    """Exit code and output of each launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [start(folder, i, port, config, *flags) for i, (folder, config) in enumerate(zip(folders, configs))]
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, output) for node, output in zip(nodes, outputs)]


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    made = [tmp_path / "first", tmp_path / "second"]
    for folder in made:
        folder.mkdir()
    return made


def test_the_main_process_decides_where_a_run_resumes(folders, recipe):
    alone = recipe("alone", **SAVING)
    train(alone)
    half = [recipe(**SAVING, steps=4)] * 2
    for code, output in launch_nodes(folders, half):
        assert code == 0, output
    assert Run(folders[0] / "run").exists() and not Run(folders[1] / "run").exists()
    # the second machine has only an older checkpoint, say of a restart in which it was the first
    old = Run(folders[1] / "run").checkpoint(2)
    shutil.copytree(Run(folders[0] / "run").checkpoint(4), old)
    for code, output in launch_nodes(folders, [alone] * 2, "--resume"):
        assert code == 0, output
    resumed = alone.replace(output_dir=str(folders[0] / "run"))
    assert_same(final_state(alone), final_state(resumed), rtol=1e-3, atol=2e-5)


def test_a_refusal_of_the_main_process_ends_all_machines(folders, recipe):
    (folders[0] / "run").mkdir()
    (folders[0] / "run" / "config.yaml").write_text("data: x\noutput_dir: run\n")
    for code, output in launch_nodes(folders, [recipe()] * 2):
        assert code != 0 and "output_dir='run' holds a run; pass --resume" in output, output


def test_machines_with_other_images_do_not_train_together(folders, recipe, few_images):
    done = launch_nodes(folders, [recipe(), recipe(data=few_images)])
    assert all(code != 0 for code, _ in done)
    assert "60 images per epoch, 8x8, 1 channel, from column 'image' here, but " in done[1][1], done[1][1]


def start_two(config: TrainConfig, *elastic: str, flags: tuple[str, ...] = ()) -> subprocess.Popen:
    """Two processes of one machine, alive until at least the third checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *elastic]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/several_gpus.md
    launcher = subprocess.Popen([*command, "-m", "ddpm_pipe", "train", write_config(config), *flags], env=environment)
    run, deadline = Run(config.output_dir), time.monotonic() + 240
    while max(run.steps(run.checkpoints), default=0) < 3:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return launcher


def test_a_process_that_is_killed_ends_the_others_within_a_minute(recipe):
    launcher = start_two(recipe(**SAVING | {"save_every": 1}, steps=10**6))
    workers = psutil.Process(launcher.pid).children()
    workers[-1].send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_group_that_torchrun_restarts_resumes_by_itself(recipe):
    undisturbed, killed = (recipe(name, **SAVING | {"save_every": 1}, steps=40) for name in ("undisturbed", "killed"))
    launcher = start_two(killed, "--max-restarts", "1", flags=("--resume",))
    psutil.Process(launcher.pid).children()[-1].send_signal(signal.SIGKILL)
    train(undisturbed)
    assert launcher.wait(timeout=240) == 0
    assert_same(final_state(undisturbed), final_state(killed), rtol=1e-2, atol=2e-4)
