"""Run everything that needs a GPU, in one command: `make gpu-report`.

The report uses the Python that runs it. It needs no network and no virtual environment, and it
installs nothing. Each step has its own process and its own time limit, and runs even if an earlier
step failed. After each step all results are packed into one archive, so that a run that is cut
short leaves the results of its finished steps.

python bench/gpu_report.py --quick                    takes 9 minutes instead of 25
python bench/gpu_report.py --device cpu --quick       runs the same steps without a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = "gpu-report.tar.gz"
TESTS = ("-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "--continue-on-collection-errors")
PEFT = "from peft.tuners.boft.layer import get_fbd_cuda; raise SystemExit(get_fbd_cuda() is None)"
NO_EXTENSION = "BOFT_OPS_BENCH_NO_PEFT_EXTENSION"  # read by peers.py
# The decisions that --quick measures, the passes over the rows first.
QUICK_OPS = (
    "rotate",
    "rotate_backward",
    "rotated_linear",
    "stage_from_skew",
    "stage_from_skew_backward",
    "plan",
)
SUITES = ("layer", "ops", "model")


class Step(NamedTuple):
    """One step of the report.

    Attributes:
        name: name of the step and of its log.
        command: arguments of the Python interpreter.
        minutes: time limit.
        skip: reason for skipping the step, or "" to run it.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    skip: str = ""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="take 9 minutes instead of 25")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the archive (build/gpu-report)")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and run nothing")
    parser.add_argument("--commit", help="the commit that is measured, if git cannot tell")
    parser.add_argument("--environment", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def steps(options: argparse.Namespace, folder: Path) -> list[Step]:
    """List the steps with their time limits, which add up to at most 9 or 25 minutes."""
    gpu, quick = options.device == "cuda", options.quick
    device, dtype = f"--device={options.device}", "bfloat16" if gpu else "float32"
    limits = (0.2, 1.5, 0.6, 1.6, 1.5, 1.2, 1.3, 1.0) if quick else (0.5, 2, 1, 5, 7, 2.5, 3.5, 3)
    environment, build, peers, tests, tune, ops, layer, model = limits
    shapes = {
        (True, True): "llama-2-7b",
        (True, False): "llama-2-7b,llama-3-8b,dinov2-large",
        (False, True): "64x48x32",
        (False, False): "deberta-v3-base",
    }[gpu, quick]
    bench = ["bench/run.py", device, f"--dtype={'bf16' if gpu else 'fp32'}", "--keep-going"]
    small = ["--model=quarter"] * quick if gpu else ["--shapes=64x48x32", "--rounds=3"]
    native = _native_library()
    return [
        Step("environment", ("bench/gpu_report.py", "--environment", str(folder)), environment),
        Step("build", ("-m", "boft_ops", "build"), build, native and f"there already: {native}"),
        # Without this step PEFT would build its extension in the middle of a benchmark.
        Step("peft", ("-c", PEFT), peers, _why_no_extension(gpu)),
        Step(
            "tests",
            ("-m", "pytest", *TESTS, *_workers(gpu), "tests" if gpu else "tests/ops/test_ops.py"),
            tests,
        ),
        Step(
            "tune",
            (
                *("-m", "boft_ops.tune", device, f"--dtype={dtype}", f"--shapes={shapes}"),
                f"--seconds={60 * tune - 20:.0f}",  # the limit less 20 seconds for the start
                *(("--ops", *QUICK_OPS) if gpu and quick else ()),
            ),
            tune,
        ),
        *(
            Step(
                name,
                (
                    *(*bench, *small, *extras, f"--suites={name}", f"--seconds={seconds}"),
                    *(f"--minutes={0.75 * minutes:g}", f"--out={folder / name}"),
                ),
                minutes,
            )
            for name, minutes, seconds, extras in (
                ("ops", ops, (20 if quick else 60) if gpu else 1, ()),
                ("layer", layer, 2 if quick else 8, () if quick else (f"--extras={_extras()}",)),
                ("model", model, 10 if quick else 40, ()),
            )
        ),
    ]


def _why_no_extension(gpu: bool) -> str:
    """Reason for not building PEFT's extension, or ""."""
    forgone = f"{NO_EXTENSION}=1" if os.environ.get(NO_EXTENSION) == "1" else ""
    return forgone if gpu else "its extension is for a GPU"


def _workers(gpu: bool) -> tuple[str, ...]:
    """Options of pytest that use several processes, which compile kernels faster than one."""
    from importlib.util import find_spec

    return ("-n", str(min(8, os.cpu_count() or 1))) if gpu and find_spec("xdist") else ()


def _extras() -> str:
    from importlib.util import find_spec

    return "compiled-boft" + (",lycoris-boft" if find_spec("lycoris") else "")


def _native_library() -> str:
    """Path of the library that this checkout loads, or ""."""
    code = "from boft_ops._runtime import native; print(native.library or '')"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=_environment(Path()),
        capture_output=True,
        text=True,
    )
    return run.stdout.strip()


def _environment(folder: Path) -> dict[str, str]:
    """Make the environment of a step: this checkout, and caches that do not need a home folder."""
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), inherited)))
    environment["PYTHONUNBUFFERED"] = "1"
    if folder != Path():
        cache = folder / "cache"  # the benchmarks find the results of the step "tune" here
        environment["BOFT_OPS_CACHE"] = str(cache)
        environment["TORCH_EXTENSIONS_DIR"] = str(cache / "extensions")
        environment.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    return environment


def run(step: Step, folder: Path) -> dict[str, object]:
    """Run a step and describe its outcome; a failing step does not raise.

    The output goes to a log, and its last lines to the screen.
    """
    print(f"==> {step.name}: at most {step.minutes:g} min", flush=True)
    if step.skip:
        print(step.skip)
        return {"step": step.name, "outcome": "skipped", "why": step.skip}
    start = time.monotonic()
    log = folder / f"{step.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=_environment(folder),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a step's child processes end with it
            # In the background of a shell this process ignores SIGINT, and the step would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            code = process.wait(60 * step.minutes)
            outcome = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            _stop(process)
            outcome = f"stopped after {step.minutes:g} min"
    tail = log.read_text(errors="replace").splitlines()[-12:]
    seconds = time.monotonic() - start
    print(
        *(f"    {line}" for line in tail), f"    {outcome}, {seconds:.0f} s", sep="\n", flush=True
    )
    return {"step": step.name, "outcome": outcome, "seconds": round(seconds, 1)}


def _stop(process: subprocess.Popen) -> None:
    """Interrupt a step, so that it can write its results, then kill it and its children."""
    for sign, patience in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue


def collect(work: Path, root: Path) -> list[Path]:
    """Copy the results to their committed paths below ``root`` and render the page.

    Returns the paths of all written files.
    """
    sys.path.insert(0, str(ROOT))  # for boft_ops, which need not be installed
    import run as bench
    from environment import slug
    from results import Results

    written = []
    parts = [path for name in SUITES for path in sorted((work / name).glob("*.json"))]
    if parts:
        contents = [json.loads(path.read_text()) for path in parts]
        merged = contents[0] | {"benchmarks": [b for c in contents for b in c["benchmarks"]]}
        text = json.dumps(merged, indent=1)
        results = Results.load_text(text)
        folder = root / "bench" / "results" / slug(results.machine["device"])
        path = bench.write(results, text, folder)
        written += [path, path.with_suffix(".csv")]
        if (work / bench.MACHINE).is_file():
            written.append(Path(shutil.copy(work / bench.MACHINE, folder)))
        images = root / "docs" / "images"
        images.mkdir(parents=True, exist_ok=True)
        bench.publish(root / "bench" / "results", root / "docs")
        written += [root / "docs" / "benchmarks.md", *sorted(images.glob("bench_layer_*"))]
    for tuned in (work / "cache" / "tuned").glob("*.json"):
        configs = root / "boft_ops" / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        written.append(Path(shutil.copy(tuned, configs)))
    return written


def pack(out: Path, work: Path, root: Path, written: Sequence[Path]) -> Path:
    """Pack the written files and the logs into one archive.

    Unpacking it at the root of the repository puts all results and configs where they belong.
    """
    archive = out / ARCHIVE
    partial = out / f".{ARCHIVE}"
    with tarfile.open(partial, "w:gz") as tar:
        for path in written:
            tar.add(path, path.relative_to(root))
        for path in sorted((*work.glob("*.log"), work / "report.json")):
            if path.is_file():
                tar.add(path, Path("build") / "gpu-report" / path.name)
    partial.replace(archive)
    return archive


def report(options: argparse.Namespace) -> int:
    """Run all steps; returns 0 if every step succeeded or was skipped, else 1."""
    out = options.out or ROOT / "build" / "gpu-report"
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as scratch:
        work = Path(scratch)
        if options.commit:
            os.environ["BOFT_OPS_BENCH_COMMIT"] = options.commit
        todo = steps(options, work)
        if options.dry_run:
            for step in todo:
                note = f" (skipped: {step.skip})" if step.skip else ""
                print(f"{step.minutes:4.1f} min  {step.name}: {' '.join(step.command)}{note}")
            return 0
        out.mkdir(parents=True, exist_ok=True)
        # A run without a GPU must not change the committed results of this repository.
        root = ROOT if options.device == "cuda" and os.access(ROOT, os.W_OK) else work / "root"
        if root != ROOT:
            shutil.copytree(ROOT / "bench" / "results", root / "bench" / "results")
        outcomes: list[dict[str, object]] = []
        for step in todo:
            outcomes.append(run(step, work))
            if step.name == "peft" and outcomes[-1]["outcome"] not in ("done", "skipped"):
                os.environ[NO_EXTENSION] = "1"
            (work / "report.json").write_text(json.dumps(outcomes, indent=2) + "\n")
            try:
                written = collect(work, root)
            except Exception as error:  # the results of the next step may still be complete
                outcomes.append({"step": f"after {step.name}", "outcome": f"failed: {error!r}"})
                written = []
            archive = pack(out, work, root, written)
        shutil.copy(work / "report.json", out)
    for outcome in outcomes:
        print(f"{outcome['step']:<12} {outcome['outcome']}  {outcome.get('seconds', '')}")
    print(f"everything is in {archive}")
    return int(any(str(o["outcome"]).startswith(("failed", "stopped")) for o in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.environment:
        from environment import write

        write(options.environment)
        return 0
    return report(options)


if __name__ == "__main__":
    sys.exit(main())
