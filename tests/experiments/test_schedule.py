"""Runs side by side: in what order, on which GPU, and what becomes of those that fail."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mambify.experiments import schedule
from mambify.experiments.evaluation import Evaluation
from mambify.experiments.jobs import Job
from mambify.experiments.registry import run_experiment

EVALUATION = Evaluation("t", (), 8, 8)
#: stands for a run: writes down when and where it was, and fails where its recipe says so
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    folder = line.strip()
    sys.stderr = open(folder + "/log.txt", "a")
    job = json.load(open(folder + "/job.json"))
    log = {"begun": time.time(), "device": sys.argv[1], "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    log["pid"] = os.getpid()
    time.sleep(0.3)
    with open(folder + "/log.json", "w") as file:
        json.dump(log | {"ended": time.time()}, file)
    print("told", file=sys.stderr, flush=True)
    if job["recipe"].get("fails") == "killed":
        os.kill(os.getpid(), 9)
    if "fails" in job["recipe"]:
        sys.exit("ValueError: no such thing")
    print("done", flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    monkeypatch.setattr(schedule, "_WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(schedule, "_LOOK_EVERY", 0.02)


def _log(job: Job, out: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads((job.folder(out) / "log.json").read_text())
    return found


@pytest.mark.usefixtures("worker")
def test_runs_wait_for_those_they_begin_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    first, other = Job("first", {"student": {}}), Job("other", {"student": {}, "x": 1})
    second = Job("second", {"student": {}}, after=first)
    said: list[str] = []
    done: list[int] = []
    failed = schedule.run_all(
        [first, second, other, first],
        tmp_path,
        EVALUATION,
        device="cuda",
        parallel=2,
        say=said.append,
        after_each=lambda: done.append(1),
    )
    assert failed == {}
    assert len(done) == 3
    logs = {job.label: _log(job, tmp_path) for job in (first, second, other)}
    assert logs["second"]["begun"] >= logs["first"]["ended"]
    assert logs["other"]["begun"] < logs["first"]["ended"]
    assert {logs["first"]["gpu"], logs["other"]["gpu"]} == {"4", "6"}
    assert {log["device"] for log in logs.values()} == {"cuda"}
    assert len({log["pid"] for log in logs.values()}) == 2  # a process goes from run to run
    assert said[0].startswith("0 of 3 runs are done")


@pytest.mark.usefixtures("worker")
def test_failures_are_named_and_what_needs_them_is_left_out(tmp_path: Path) -> None:
    bad, killed, good = Job("bad", {"fails": ""}), Job("killed", {"fails": "killed"}), Job("good", {})
    after = Job("after", {"student": {}}, after=bad)
    failed = schedule.run_all(
        [bad, killed, after, good], tmp_path, EVALUATION, device="cpu", parallel=3, say=lambda _: None
    )
    assert failed == {
        bad.key: "ValueError: no such thing",
        killed.key: "killed by signal 9 after: told",
        after.key: "begins from bad, which failed",
    }
    assert _log(good, tmp_path)["device"] == "cpu"


@pytest.mark.usefixtures("worker")
def test_a_process_whose_run_failed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    jobs = [Job("good", {}), Job("bad", {"fails": ""}), Job("better", {"x": 1})]
    failed = schedule.run_all(jobs, tmp_path, EVALUATION, device="cuda:0", parallel=1, say=lambda _: None)
    assert list(failed) == [jobs[1].key]
    good, bad, better = (_log(job, tmp_path)["pid"] for job in jobs)
    assert good == bad != better


@pytest.mark.usefixtures("worker")
def test_processes_end_with_the_experiment(tmp_path: Path) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        schedule.run_all([Job("one", {})], tmp_path, EVALUATION, device="cpu", parallel=2, say=stop)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("device", "places"), [("cpu", [""]), ("cuda", ["4", "6"]), ("cuda:1", ["6"])])
def test_places(device: str, places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert schedule._places(device, 4) == places
    assert schedule._places(device, 1) == places[:1]


def test_a_worker_ends_when_nobody_holds_it(tmp_path: Path) -> None:
    program = "import sys, time; from mambify.experiments import worker\n"
    program += "worker.work = lambda *_, **__: (print('works', flush=True), time.sleep(200))\n"
    program += "worker.main('cpu')"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(f"{tmp_path}\n".encode())
    process.stdin.flush()
    log, until = tmp_path / "log.txt", time.monotonic() + 60
    while (not log.is_file() or log.read_text() != "works\n") and time.monotonic() < until:
        time.sleep(0.05)
    assert log.read_text() == "works\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=20) == 1


@pytest.mark.slow
def test_side_by_side_is_the_same(options: dict[str, Any]) -> None:
    asked = options | {"recipes": ("paper", "best")}
    alone = run_experiment("recipes", device="cpu", **asked)
    beside = run_experiment("recipes", device="cpu", **asked | {"out": options["out"] / "other", "parallel": 2})
    for one, other in zip(alone["results"], beside["results"], strict=True):
        assert one["sources"] == other["sources"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mambify.experiments.jobs.distill", None)
        again = run_experiment("recipes", device="cpu", **asked | {"out": options["out"] / "other"})
    assert again["results"] == beside["results"]
