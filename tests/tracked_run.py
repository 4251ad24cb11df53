"""A short run with a tracker, in a process of its own: `python tests/tracked_run.py <tracker> <run folder>`.

It prints, as JSON, each address of the network that Python connects to, looks up or binds to.
"""

import json
import sys
from pathlib import Path

from runs import make_recipe

from ddpm_pipe.training.loop import train

ASKED = {"socket.connect": 1, "socket.getaddrinfo": 0, "socket.bind": 1}
"""Audit event of Python -> which of its arguments is the address."""
NO_NETWORK = ("::1", 0)
"""What urllib3 binds to when it is imported, to find out whether there is IPv6."""


def main() -> None:
    addresses: list[object] = []

    def note(event: str, arguments: tuple) -> None:
        if (event in ASKED and not isinstance(arguments[ASKED[event]], (bytes, str))) or event == "socket.getaddrinfo":
            addresses.append(arguments[ASKED[event]])  # a path is a socket of this machine alone

    sys.addaudithook(note)
    tracker, folder = sys.argv[1:]
    train(make_recipe(Path(folder), tracker=tracker, sample_every=3, log_every=2, holdout=10))
    print(json.dumps([str(address) for address in addresses if address != NO_NETWORK]))


if __name__ == "__main__":
    main()
