"""Runs in a process of their own: ``python -m mambify.experiments.worker DEVICE``.

It does the runs in the folders that it is told of, a line each on its standard input, and answers each with a line on
its standard output. What a run says goes to ``log.txt`` in its folder. The first run that fails ends the process; so
does the end of its standard input, that is of whoever started it, however that came about.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
from pathlib import Path

import torch

from mambify.errors import MambifyError
from mambify.experiments.jobs import Common, work

LOG = "log.txt"
DONE = b"done\n"


def main(device: str) -> int:
    """Does runs until one fails; returns the exit status."""
    folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(folders,), daemon=True).start()
    answers, common = os.dup(1), Common(device)
    while True:
        folder = folders.get()
        _speak_into(folder / LOG)
        try:
            work(folder, common, say=_say)
        except MambifyError as error:
            _say(" ".join(str(error).split()))
            return error.exit_status
        gc.collect()  # a trainer and its callbacks know each other, and hold the run's memory
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        os.write(answers, DONE)


def _listen(folders: queue.SimpleQueue[Path]) -> None:
    for line in sys.stdin:
        folders.put(Path(line.rstrip("\n")))
    os._exit(1)


def _speak_into(log: Path) -> None:
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
