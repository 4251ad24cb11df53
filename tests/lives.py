"""Real processes for little: a parent imports the package once and forks a child for every life of a run.

Run as a program this file is that parent; imported, it is the tests' handle on it. A child does what `python
examples/train.py ...`, or another program, does, up to the end of the interpreter; only the seconds that importing
torch takes are shared.
"""

import faulthandler
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent

# ---------------------------------------------------------------- the handle


class Life:
    """One process of a run, from its start to its end."""

    def __init__(self, lives: "Lives", pid: int, log: Path):
        self.lives, self.pid, self.log = lives, pid, log

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)  # it stays a zombie until `wait`, so the pid is never another's

    def assert_alive(self) -> None:
        state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        assert state != "Z", self.errors

    def wait(self, timeout: float = 120) -> int:
        """The exit code, negative for a signal; what hangs is killed and raises."""
        code = self.lives.ask(wait=self.pid, timeout=timeout)
        if code is None:
            raise TimeoutError(f"still alive after {timeout} s:\n{self.errors}")
        return code

    @property
    def output(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text()


class Lives:
    """The parent of the processes.

    `environment` is that of the parent, on top of this process's own. `start` runs the training of a config file in a
    new process:
        program: the script to run instead of examples/train.py.
        die_in: the write to its folder that it does not survive, by number or by a part of its name (`watch_writes`).
        record: a file to list its writes in.
        limit: most bytes of a file; more is an OSError, as on a full disk. 0 for no limit.
    """

    def __init__(self, **environment: str):
        self.folder, self.count = Path(tempfile.mkdtemp(prefix="lives-")), 0
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables | environment,
        )

    def ask(self, **request: Any) -> Any:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *argv: str,
        program: str = "examples/train.py",
        die_in: int | str = 0,
        record: Path | None = None,
        limit: int = 0,
        environment: dict[str, str] | None = None,
    ) -> Life:
        self.count += 1
        log = self.folder / str(self.count)
        options = {"die_in": die_in, "record": record and str(record), "limit": limit}
        pid = self.ask(program=program, argv=argv, log=str(log), environment=environment or {}, **options)
        return Life(self, pid, log)

    def start_ranks(self, count: int, *argv: str, **options: Any) -> list[Life]:
        """The processes of one run, told of each other as `torchrun` tells them."""
        from torch.distributed import TCPStore

        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # they meet at its free port
        whole = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        whole |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        ranks = [whole | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.start(*argv, environment=rank, **options) for rank in ranks]

    def complete(self, *argv: str, processes: int = 1, **options: Any) -> Life:
        """Let a run come to its end; the life of its main process."""
        ranks = self.start_ranks(processes, *argv, **options) if processes > 1 else [self.start(*argv, **options)]
        for life in ranks:
            code = life.wait()
            assert code == 0, f"exit code {code}: {life.errors}"
        return ranks[0]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder)


# ---------------------------------------------------------------- the parent


def serve() -> None:
    """Start and await children as told, one request and one answer a line. A child returns from here too."""
    os.chdir(REPO)
    for name in ("ddpm_pipe.training.loop", "matplotlib.backends.backend_agg", "scipy.io", "diffusers.schedulers"):
        importlib.import_module(name)

    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in threads[1:] if name != "jemalloc_bg_thd"]  # pyarrow's, which knows about forks
    assert not others, f"a child forked beside the threads {others} could hang"
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if not answer:
                return live(**request)
        print(json.dumps(answer), flush=True)


def wait(pid: int, timeout: float) -> int | None:
    """The exit code of a child; None where it had to be killed."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGUSR1)  # it says where it hangs
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)


def live(
    program: str,
    argv: list[str],
    log: str,
    environment: dict[str, str],
    die_in: int | str,
    record: str | None,
    limit: int,
) -> None:
    """Be a new process that trains, or does what another program does."""
    import resource

    import numpy as np
    import torch

    for name, mode, descriptor in (("/dev/null", "r", 0), (f"{log}.out", "w", 1), (f"{log}.err", "w", 2)):
        with open(name, mode) as file:
            os.dup2(file.fileno(), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(environment)
    for seed in (random.seed, np.random.seed, torch.seed):  # no two processes start with the same
        seed()
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if die_in or record:
        watch_writes(die_in, record)
    sys.argv = [program, *argv]
    runpy.run_path(program, run_name="__main__")


def watch_writes(die_in: int | str, record: str | None) -> None:
    """Count what the run does to its folder, named `call path`, and die in the middle of the first that is `die_in`.

    A number counts the writes of checkpoints, averages and pipeline only, from 1. In the middle means: half a file
    is written; a text file is opened and empty; one file of a folder to delete is gone; a rename or sync is not done.
    """
    import safetensors.torch
    import torch

    saves = 0

    def watch(owner: Any, name: str, path_of: Callable, spoil: Callable | None = None) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal saves
            path = Path(path_of(*args))
            place = inside_run(path)
            if place is None:
                return original(*args, **kwargs)
            saves += re.match(r"\.?(checkpoints|ema|pipeline)\b", place) is not None
            label = f"{name} {place}"
            if record:
                with open(record, "a") as file:
                    file.write(f"{label}\n")
            if die_in in label if isinstance(die_in, str) else 0 < die_in == saves:
                if spoil:
                    spoil(lambda: original(*args, **kwargs), path)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    watch(safetensors.torch, "save_file", lambda tensors, path, *_: path, half_write)
    watch(torch, "save", lambda value, path, *_: path, half_write)
    watch(Path, "write_text", lambda path, *_: path, lambda write, path: path.open("w"))
    watch(os, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    watch(Path, "rename", lambda path, *_: path)
    watch(Path, "replace", lambda path, *_: path)
    watch(os, "replace", lambda path, *_: path)
    watch(shutil, "rmtree", lambda path, *_: path, half_delete)


def inside_run(path: Path) -> str | None:
    """The path inside the run folder, which is the last one called `run`; None for others."""
    names = path.parts
    return "/".join(names[len(names) - names[::-1].index("run") :]) if "run" in names else None


def half_write(write: Callable[[], Any], path: Path) -> None:
    write()
    os.truncate(path, path.stat().st_size // 2)


def half_delete(delete: Callable[[], Any], path: Path) -> None:
    for file in sorted(path.rglob("*.*"))[:1]:
        file.unlink()


if __name__ == "__main__":
    serve()
