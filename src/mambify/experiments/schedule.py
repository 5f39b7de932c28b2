"""Runs the runs of an experiment, one after another or side by side; what is done stays done, what fails is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from mambify.experiments.evaluation import Evaluation
from mambify.experiments.jobs import Job, Say, is_done, work, write_job

_WORKER = (sys.executable, "-m", "mambify.experiments.worker")
_LOOK_EVERY, _TELL_EVERY = 0.2, 30.0  # seconds


def run_all(
    jobs: Sequence[Job], out: Path, evaluation: Evaluation, *, device: str, parallel: int, say: Say
) -> dict[str, str]:
    """Does all runs that are not done yet.

    On a GPU each run has a process of its own, so that it begins with empty memory and takes none down with it.

    Args:
        jobs: each after those that it begins from.
        parallel: how many at a time; on GPUs, one after another of those that can be seen.

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
        return _one_by_one(list(waiting.values()), out, evaluation, device, say)
    return _side_by_side(list(waiting.values()), out, evaluation, device, parallel, say)


def _one_by_one(jobs: Sequence[Job], out: Path, evaluation: Evaluation, device: str, say: Say) -> dict[str, str]:
    failed: dict[str, str] = {}
    for number, job in enumerate(jobs, 1):
        if job.after is not None and job.after.key in failed:
            failed[job.key] = f"begins from {job.after.label}, which failed"
            continue
        prefix = f"[{number}/{len(jobs)}] {job.label}: "
        try:
            work(write_job(job, out, evaluation), device=device, say=lambda words, prefix=prefix: say(prefix + words))  # type: ignore[misc]
        except Exception as error:  # whatever it was, the other runs are worth having
            failed[job.key] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            say(f"{prefix}failed: {failed[job.key]}")
    return failed


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    place: str
    since: float


def _side_by_side(
    jobs: Sequence[Job], out: Path, evaluation: Evaluation, device: str, parallel: int, say: Say
) -> dict[str, str]:
    waiting, failed, count = list(jobs), dict[str, str](), 0
    places = _places(device, parallel)
    with _ended() as running:
        told = time.monotonic()
        while waiting or running:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _let_go(one.process)
                count += 1
                took = f"{time.monotonic() - one.since:.0f} s"
                if one.process.returncode == 0:
                    say(f"[{count}/{len(jobs)}] {one.job.label}: done in {took}")
                else:
                    failed[one.job.key] = _reason(one)
                    say(f"[{count}/{len(jobs)}] {one.job.label}: failed: {failed[one.job.key]} (all of it: {one.log})")
            for job in list(waiting):
                after = job.after
                if after is not None and after.key in failed:
                    waiting.remove(job)
                    count += 1
                    failed[job.key] = f"begins from {after.label}, which failed"
                elif len(running) < parallel and not _unfinished(after, [*waiting, *(one.job for one in running)]):
                    waiting.remove(job)
                    free = min(places, key=lambda place: sum(one.place == place for one in running))
                    running.append(_start(job, out, evaluation, device, free, parallel))
                    say(f"{job.label}: begun{f' on GPU {free}' if free else ''}")
            if time.monotonic() - told > _TELL_EVERY:
                told = time.monotonic()
                for one in running:
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


def _start(job: Job, out: Path, evaluation: Evaluation, device: str, place: str, parallel: int) -> _Running:
    folder = write_job(job, out, evaluation)
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // parallel, 1))}
    environment = threads | os.environ | ({"CUDA_VISIBLE_DEVICES": place} if place else {})
    log = folder / "log.txt"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*_WORKER, str(folder), "cuda" if place else device],
            stdin=subprocess.PIPE,  # held open for as long as this process is there
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    return _Running(job, process, log, place, time.monotonic())


@contextmanager
def _ended() -> Iterator[list[_Running]]:
    """A list of processes, those of which that still run are ended with the block."""
    running: list[_Running] = []
    try:
        yield running
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            _let_go(one.process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process that ends, and closes what held it."""
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _reason(ended: _Running) -> str:
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
