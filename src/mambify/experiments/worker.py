"""One run in a process of its own: ``python -m mambify.experiments.worker FOLDER DEVICE``.

It ends when its standard input does, that is when whoever started it is gone, however that came about.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from mambify.errors import MambifyError
from mambify.experiments.jobs import work


def main(folder: str, device: str) -> int:
    """Does the run in ``folder``; returns the exit status. What it says goes to stdout, an error as its last line."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(Path(folder), device=device, say=_say)
    except MambifyError as error:
        _say(" ".join(str(error).split()))
        return error.exit_status
    return 0


def _say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
