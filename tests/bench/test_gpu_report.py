"""`make gpu-report`: its steps, their independence, and a whole run without a GPU."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from bench_modules import BENCH, gpu_report, models

ROOT = BENCH.parent


@pytest.mark.parametrize(("flags", "minutes"), [(["--quick"], 9), ([], 25)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_steps_fit_the_time(flags, minutes, device, tmp_path):
    options = gpu_report.arguments([*flags, f"--device={device}"])
    steps = gpu_report.steps(options, tmp_path)
    names = ["environment", "build", "peft", "tests", "tune", "ops", "layer", "model"]
    assert [step.name for step in steps] == names
    assert sum(step.minutes for step in steps) <= minutes
    for step in steps:
        assert step.minutes > 0
        if step.command[0].endswith(".py"):
            assert (ROOT / step.command[0]).is_file()
    by_name = {step.name: step.command for step in steps}
    assert f"--device={device}" in by_name["tune"]
    if flags and device == "cuda":
        model = next(a for a in by_name["model"] if a.startswith("--model="))
        assert model.removeprefix("--model=") in models.MODELS


def step(name, code, minutes=1.0):
    return gpu_report.Step(name, ("-c", code), minutes)


def test_a_step_never_raises(tmp_path):
    assert gpu_report.run(step("good", "print('hello')"), tmp_path)["outcome"] == "done"
    assert (tmp_path / "good.log").read_text() == "hello\n"
    assert gpu_report.run(step("bad", "raise SystemExit(7)"), tmp_path)["outcome"] == "failed (7)"
    skipped = gpu_report.run(step("none", "")._replace(skip="no reason"), tmp_path)
    assert skipped == {"step": "none", "outcome": "skipped", "why": "no reason"}


def test_a_step_that_takes_too_long_is_interrupted(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        result = gpu_report.run(step("slow", code, 0.1), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result["outcome"] == "stopped after 0.1 min"
    assert (tmp_path / "slow.log").read_text() == "kept\n"


def test_the_files_of_a_failed_step_are_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu_report, "steps", lambda *_: [step("first", "raise SystemExit(1)"), step("second", "")]
    )
    out = tmp_path / "out"
    assert gpu_report.main(["--device=cpu", "--quick", f"--out={out}"]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["gpu-report.tar.gz", "report.json"]
    outcomes = json.loads((out / "report.json").read_text())
    assert [o["outcome"] for o in outcomes] == ["failed (1)", "done"]
    with tarfile.open(out / "gpu-report.tar.gz") as tar:
        assert {Path(name).name for name in tar.getnames()} == {
            "first.log",
            "second.log",
            "report.json",
        }


@pytest.mark.exhaustive
@pytest.mark.timeout(540)
def test_a_whole_report_without_a_gpu(tmp_path):
    """All steps run on tiny shapes and leave the repository unchanged."""
    before = (ROOT / "docs" / "benchmarks.md").read_text()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BOFT_OPS", "TRITON"))}
    command = [sys.executable, str(BENCH / "gpu_report.py"), "--device=cpu", "--quick"]
    run = subprocess.run(
        [*command, f"--out={tmp_path}"], env=environment, capture_output=True, text=True
    )
    outcomes = {o["step"]: o for o in json.loads((tmp_path / "report.json").read_text())}
    assert run.returncode == 0, (outcomes, run.stdout[-5000:], run.stderr[-3000:])
    assert {o["outcome"] for o in outcomes.values()} <= {"done", "skipped"}
    with tarfile.open(tmp_path / "gpu-report.tar.gz") as tar:
        tar.extractall(tmp_path / "root", filter="data")
    results = json.loads((tmp_path / "root/bench/results/cpu/auto.json").read_text())
    assert results["machine_info"]["tuned"] is True
    suites = {b["extra_info"]["suite"] for b in results["benchmarks"]}
    assert suites == {"ops", "layer", "model"}
    page = (tmp_path / "root/docs/benchmarks.md").read_text()
    assert "## NVIDIA H200, bf16" in page  # committed results of other devices stay on the page
    assert "### Llama tiny" in page
    (config,) = (tmp_path / "root/boft_ops/configs").glob("*.json")
    assert json.loads(config.read_text())["choices"]
    machine = json.loads((tmp_path / "root/bench/results/cpu/environment.json").read_text())
    assert machine["cpu"]
    assert (ROOT / "docs" / "benchmarks.md").read_text() == before
