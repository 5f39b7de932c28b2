"""Runs the runs of an experiment, one after another or side by side; what is done stays done, what fails is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from mambify.experiments.evaluation import Evaluation
from mambify.experiments.jobs import Common, Job, Report, Say, is_done, work, write_job
from mambify.experiments.request import Request
from mambify.experiments.worker import DONE, LOG

_WORKER = (sys.executable, "-m", "mambify.experiments.worker")
_LOOK_EVERY, _TELL_EVERY = 0.2, 30.0  # seconds


def run_and_report(
    jobs: Sequence[Job],
    request: Request,
    evaluation: Evaluation,
    result: Callable[[Mapping[str, str]], dict[str, Any]],
    *,
    device: str,
    say: Say,
    report: Report,
) -> dict[str, Any]:
    """As :func:`run_all`; what ``result`` makes of the runs and of those that failed, by key.

    Args:
        report: given what it makes of those that are done, whenever one is.
    """
    failed = run_all(
        jobs,
        request.out,
        evaluation,
        device=device,
        parallel=request.parallel,
        say=say,
        after_each=lambda: report(result({})),
    )
    return result(failed)


def run_all(
    jobs: Sequence[Job],
    out: Path,
    evaluation: Evaluation,
    *,
    device: str,
    parallel: int,
    say: Say,
    after_each: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Does all runs that are not done yet.

    On a GPU runs have processes of their own, as many as are done at a time. A process goes from run to run, so that
    teacher, text and kernels are there already; the one whose run failed is not used again.

    Args:
        jobs: each after those that it begins from; begun in this order.
        parallel: how many at a time; on GPUs, one after another of those that can be seen.
        after_each: called when a run is done.

    Returns:
        Key → what went wrong, of the runs that are not done.
    """
    all_of_them: dict[str, Job] = {}
    for job in jobs:
        twin = all_of_them.get(job.key, job)
        all_of_them[job.key] = replace(twin, silenced=twin.silenced or job.silenced)
    waiting = {key: job for key, job in all_of_them.items() if not is_done(job, out, evaluation)}
    say(f"{len(all_of_them) - len(waiting)} of {len(all_of_them)} runs are done; the rest goes to {out / 'runs'}")
    if device == "cpu" and parallel == 1:
        return _one_by_one(list(waiting.values()), out, evaluation, device, say, after_each)
    return _side_by_side(list(waiting.values()), out, evaluation, device, parallel, say, after_each)


def _one_by_one(
    jobs: Sequence[Job], out: Path, evaluation: Evaluation, device: str, say: Say, after_each: Callable[[], None]
) -> dict[str, str]:
    failed: dict[str, str] = {}
    common = Common(device)
    for number, job in enumerate(jobs, 1):
        if job.after is not None and job.after.key in failed:
            failed[job.key] = f"begins from {job.after.label}, which failed"
            continue
        prefix = f"[{number}/{len(jobs)}] {job.label}: "
        try:
            work(write_job(job, out, evaluation), common, say=lambda words, prefix=prefix: say(prefix + words))  # type: ignore[misc]
        except Exception as error:  # whatever it was, the other runs are worth having
            failed[job.key] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            say(f"{prefix}failed: {failed[job.key]}")
        else:
            after_each()
    return failed


@dataclass
class _Worker:
    """A process, and what it does or did last."""

    process: subprocess.Popen[bytes]
    place: str
    job: Job
    log: Path
    since: float
    busy: bool = True

    def begin(self, job: Job, folder: Path) -> None:
        self.job, self.log, self.since, self.busy = job, folder / LOG, time.monotonic(), True
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder.absolute()}\n".encode())
        self.process.stdin.flush()

    def look(self) -> bool | None:
        """Whether its run went well; ``None`` while it goes on."""
        assert self.process.stdout is not None
        ended = self.process.poll() is not None
        if self.process.stdout.read(len(DONE)) == DONE:
            return True
        return False if ended else None

    @property
    def serves(self) -> bool:
        """Whether it can be given a run."""
        return not self.busy and self.process.poll() is None


def _side_by_side(
    jobs: Sequence[Job],
    out: Path,
    evaluation: Evaluation,
    device: str,
    parallel: int,
    say: Say,
    after_each: Callable[[], None],
) -> dict[str, str]:
    waiting, failed, count = list(jobs), dict[str, str](), 0
    places = _places(device, parallel)
    with _ended() as workers:
        told = time.monotonic()
        while waiting or any(one.busy for one in workers):
            for one in [one for one in workers if one.busy]:
                went_well = one.look()
                if went_well is None:
                    continue
                one.busy = False
                count += 1
                head = f"[{count}/{len(jobs)}] {one.job.label}: "
                if went_well:
                    say(f"{head}done in {time.monotonic() - one.since:.0f} s")
                    after_each()
                else:
                    workers.remove(one)
                    _let_go(one.process)
                    failed[one.job.key] = _reason(one)
                    say(f"{head}failed: {failed[one.job.key]} (all of it: {one.log})")
            for job in list(waiting):
                after, busy = job.after, [one for one in workers if one.busy]
                if after is not None and after.key in failed:
                    waiting.remove(job)
                    count += 1
                    failed[job.key] = f"begins from {after.label}, which failed"
                elif len(busy) < parallel and not _unfinished(after, [*waiting, *(one.job for one in busy)]):
                    waiting.remove(job)
                    place = min(places, key=lambda place: sum(one.place == place for one in busy))
                    folder = write_job(job, out, evaluation)
                    worker = next((one for one in workers if one.serves and one.place == place), None)
                    if worker is None:
                        worker = _started(job, folder, device, place, parallel)
                        workers.append(worker)
                    worker.begin(job, folder)
                    say(f"{job.label}: begun{f' on GPU {place}' if place else ''}")
            if time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                for one in (one for one in workers if one.busy):
                    say(f"{one.job.label}: {_last_line(one.log)}")
            time.sleep(_LOOK_EVERY)
    return failed


def _unfinished(job: Job | None, among: Sequence[Job]) -> bool:
    return job is not None and any(job.key == other.key for other in among)


def _places(device: str, parallel: int) -> list[str]:
    """The GPUs to take, as ``CUDA_VISIBLE_DEVICES`` names them; an empty name on a CPU."""
    if device == "cpu":
        return [""]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(index) for index in range(torch.cuda.device_count())]
    index = torch.device(device).index
    return names[:parallel] if index is None else [names[index]]


def _started(job: Job, folder: Path, device: str, place: str, parallel: int) -> _Worker:
    """A new process, for this run first."""
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // parallel, 1))}
    environment = threads | os.environ | ({"CUDA_VISIBLE_DEVICES": place} if place else {})
    log = folder / LOG
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*_WORKER, "cuda" if place else device],
            stdin=subprocess.PIPE,  # held open for as long as this process is there
            stdout=subprocess.PIPE,
            stderr=file,
            env=environment,
            bufsize=0,
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return _Worker(process, place, job, log, time.monotonic())


@contextmanager
def _ended() -> Iterator[list[_Worker]]:
    """A list of processes that are ended with the block."""
    workers: list[_Worker] = []
    try:
        yield workers
    finally:
        for one in workers:
            one.process.terminate()
        for one in workers:
            _let_go(one.process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process that ends, and closes what held it."""
    process.wait()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def _reason(ended: _Worker) -> str:
    """Why a process failed: what it said last; of one that was killed that is not the reason, only how far it was."""
    said, status = _last_line(ended.log), ended.process.returncode
    return f"killed by signal {-status} after: {said}" if status < 0 else said


def _last_line(log: Path) -> str:
    """The last line of a log that says anything, of its last few kilobytes."""
    file: IO[bytes]
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - 4096, 0))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
