"""bench/gpu_decide.py: a whole dry run on the CPU, cut and killed, and the parts of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bench_modules import BENCH, decide_contest, decide_errors, decide_lines, gpu_decide, page

ROOT = BENCH.parent
SCRIPT = str(BENCH / "gpu_decide.py")
CPU = decide_contest.setting("cpu", 1.0)


def start(out, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BOFT_OPS", "TRITON"))}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, "--device=cpu", f"--out={out}", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def lines_in(out):
    path = out / decide_lines.NAME
    return decide_lines.read(path) if path.exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found


def field_of(pid, index):
    """A number of /proc/<pid>/stat after the name; None if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[index])
    except (OSError, ValueError):
        return None


def sections_of(process):
    """The processes of sections: descendants that lead a session of their own."""
    found = set()
    for pid in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
        ancestor = pid if field_of(pid, 3) == pid else None
        while ancestor not in (None, 0, process.pid):
            ancestor = field_of(ancestor, 1)
        if ancestor == process.pid:
            found.add(pid)
    return found - {process.pid}


# --- A whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Make a dry run, in which the process of one section is killed."""
    out = tmp_path_factory.mktemp("decide") / "out"
    process = start(out)
    wait_for(lambda: any(is_begun(line, "kernels") for line in lines_in(out)))
    for pid in sections_of(process):
        os.kill(pid, signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return out, text


def is_begun(line, section):
    return (line["kind"], line["section"]) == ("begun", section)


@pytest.mark.exhaustive
def test_every_section_is_done_although_one_was_killed(dry_run):
    lines = lines_in(dry_run[0])
    outcomes = {line["section"]: line["outcome"] for line in lines if line["kind"] == "section"}
    assert outcomes == {section.name: "done" for section in gpu_decide.SECTIONS}
    begun = [line["part"] for line in lines if is_begun(line, "kernels")]
    assert len(begun) == len(set(begun)) > 20  # no part was begun again
    figures = decide_lines.figures(lines)
    measured = {figure.section for figure in figures}
    assert measured == {s.name for s in gpu_decide.SECTIONS} - {"cublas", "checks"}
    assert {f.name for f in figures if f.section == "host"} == {
        "linear", "lora-r16", "peft-oft", "boft-2-8", "boft-2-8 cpu", "peft-boft",
    }  # fmt: skip
    assert max(len(f.by_round) for f in figures if f.name == "peft-boft") == 3
    assert all(min(figure.by_round.values()) > 0 for figure in figures)
    failed = [line for line in lines if line["kind"] == "failed"]
    whys = {line["section"]: line["why"] for line in failed}
    no_library = "RuntimeError: no libcublasLt.so is loaded"
    assert whys == {"cublas": no_library, "checks": "needs a GPU"}, failed
    (facts,) = (line for line in lines if line.get("part") == "environment" and "torch" in line)
    assert facts["device"] == "cpu"
    assert facts["dtype"] == "float32"


@pytest.mark.exhaustive
def test_a_run_that_was_cut_at_any_byte_gives_a_table(dry_run, tmp_path):
    out, _ = dry_run
    content = (out / decide_lines.NAME).read_bytes()
    whole = decide_lines.read(out / decide_lines.NAME)
    for size in range(0, len(content), len(content) // 40):
        path = tmp_path / decide_lines.NAME
        path.write_bytes(content[:size])
        cut = decide_lines.read(path)
        assert cut == whole[: len(cut)]
        assert len(cut) == content[:size].count(b"\n")
    assert gpu_decide.main([f"--table={tmp_path}"]) == 0


@pytest.mark.exhaustive
def test_the_table_is_made_again_from_the_lines(dry_run, capsys):
    out, text = dry_run
    gpu_decide.main([f"--table={out}"])
    table = capsys.readouterr().out
    assert table == (out / gpu_decide.TABLE).read_text()
    assert table in text
    assert "host: enqueued, 256x256x16, us of the host\n  frozen nn.Linear" in table
    assert "  met: the error of each kernel against float64" in table
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.jsonl", "table.txt"]


@pytest.mark.exhaustive
def test_results_are_not_overwritten(dry_run):
    with pytest.raises(SystemExit, match=r"expected a folder without results\.jsonl"):
        gpu_decide.main([f"--out={dry_run[0]}", "--device=cpu"])


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    command = [sys.executable, SCRIPT, f"--out={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "--device: expected a CUDA device, found none" in run.stderr
    assert lines_in(tmp_path) == []


@pytest.mark.exhaustive
def test_lines_go_to_the_page(dry_run, tmp_path, monkeypatch):
    folder, path = tmp_path / "bench" / "results", tmp_path / "docs" / "benchmarks.md"
    path.parent.mkdir()
    path.write_text("<!-- table: results -->\n<!-- end of table -->\n")
    monkeypatch.setattr(page, "FOLDER", folder)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_decide, "ROOT", tmp_path)
    gpu_decide.main([f"--publish={dry_run[0]}"])
    (copy,) = folder.glob("*/decide.jsonl")
    assert copy.read_bytes() == (dry_run[0] / decide_lines.NAME).read_bytes()
    text = path.read_text()
    assert "### CPU: what gpu_decide.py measured" in text
    assert "| host, enqueued, 256x256x16: PEFT LoRA r=16 |" in text
    assert "- met: the error of each kernel against float64" in text
    assert "No GPU has run" not in text


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_lines_and_no_processes(tmp_path, how):
    process = start(tmp_path)
    wait_for(lambda: len(lines_in(tmp_path)) > 10)
    ours = sections_of(process)
    assert ours
    process.send_signal(how)
    text, _ = process.communicate(timeout=60)
    wait_for(lambda: all(field_of(pid, 3) is None for pid in ours), 10)
    assert len(lines_in(tmp_path)) > 10
    if how == signal.SIGKILL:
        assert gpu_decide.main([f"--table={tmp_path}"]) == 0
    else:
        assert process.returncode == 0
        assert "interrupted: the table has what was measured until then" in text
        assert "VERDICTS" in text


# --- Sections -------------------------------------------------------------------------------------


def test_the_sections_fit_the_time():
    *measured, last = gpu_decide.SECTIONS
    assert last.name == "checks"
    assert sum(section.seconds for section in measured) < 60 * 8.5 - gpu_decide.RESERVE
    assert all(section.seconds > 2 * gpu_decide.START for section in measured)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --out, --table and --publish"),
        (["--out=a", "--table=b"], "expected one of --out, --table and --publish"),
        (["--out=a", "--minutes=0"], "--minutes: expected a positive number, got 0.0"),
        (["--out=a", "--sections=host,hosts"], r"--sections: expected some of .*, got \['hosts'\]"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_decide.arguments(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_parts_survive_each_other(tmp_path):
    writer = decide_lines.Writer(tmp_path / decide_lines.NAME, "some")
    done = []

    def fail():
        raise ValueError("first\nlast")

    def spoil():
        raise decide_contest.CaptureFailed("no graph")

    parts = [("a", fail), ("b", lambda: done.append("b")), ("c", lambda: done.append("c"))]
    later = time.monotonic() + 60
    decide_contest.run_parts(iter(parts), writer, CPU.device, later, {"b"})
    assert done == ["c"]
    with pytest.raises(decide_contest.CaptureFailed):
        decide_contest.run_parts(iter([("d", spoil), *parts]), writer, CPU.device, later, set())
    decide_contest.run_parts(iter(parts[1:2]), writer, CPU.device, 0.0, set())
    lines = [(line["kind"], line["part"], line.get("why")) for line in lines_in(tmp_path)]
    assert lines == [
        ("begun", "a", None),
        ("failed", "a", "ValueError: last"),
        ("begun", "c", None),
        ("begun", "d", None),
        ("failed", "d", "CaptureFailed: no graph"),
        ("failed", "b", "no time left"),
    ]


def test_a_contestant_that_fails_is_left_out(tmp_path):
    writer = decide_lines.Writer(tmp_path / decide_lines.NAME, "some")

    def fail():
        raise RuntimeError("no kernel")

    inside = []

    @contextmanager
    def within():
        inside.append(True)
        yield
        inside.pop()

    rivals = [
        decide_contest.Rival("bad", "bad", fail),
        decide_contest.Rival("good", "good", lambda: lambda: inside[0], within=within),
    ]
    decide_contest.by_clock(writer, "part", rivals, CPU, 0.01)
    failed, figure = lines_in(tmp_path)
    assert (failed["name"], failed["why"]) == ("bad", "RuntimeError: no kernel")
    assert (figure["name"], figure["first"], figure["clock"]) == ("good", "good", "both")
    assert inside == []


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "figure"}'])
def test_a_spoiled_line_is_refused(tmp_path, line):
    path = tmp_path / decide_lines.NAME
    path.write_text('{"kind": "begun", "section": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: expected"):
        decide_lines.read(path)


def test_the_later_of_two_figures_counts(tmp_path):
    writer = decide_lines.Writer(tmp_path / decide_lines.NAME, "some")
    writer.figure("part", "a", "A", {0: 1.0, 2: 3.0}, size=16)
    writer.figure("part", "a", "A", {0: 2.0, 2: 4.0, 3: 1.23456789}, size=16)
    (figure,) = decide_lines.figures(lines_in(tmp_path))
    assert figure.by_round == {0: 2.0, 2: 4.0, 3: 1.2346}
    assert figure.quartiles[0] == 2.0
    assert figure.facts == {"size": 16}
    assert json.loads((tmp_path / decide_lines.NAME).read_text().splitlines()[0])["median"] == 2.0


# --- Errors ---------------------------------------------------------------------------------------


class HalfWritten:
    """An operator that may leave a part of its output as it was."""

    name, comparable, tunable = "half", staticmethod(lambda result: result), None
    kernels, unavailable = {}, {"triton": "", "cuda": ""}

    def __init__(self, written):
        self.written, self.memory = written, torch.zeros(8)

    def supports(self, backend, args):
        return True

    def tiles(self):
        return None

    def __call__(self, x):
        if x.dtype == torch.float64 or decide_errors.backend.forced():
            return 2 * x
        self.memory[: self.written] = 2 * x[: self.written]
        return self.memory


@pytest.mark.parametrize(("written", "wrong"), [(8, False), (7, True)])
def test_an_output_that_was_not_written_is_found(tmp_path, written, wrong):
    from bench_modules import decide_kernels

    op = HalfWritten(written)
    workload = decide_kernels.Workload(8, 8, 8, 2, 8)
    case = decide_kernels.Case("half", op, workload, lambda w: (w.tensor(8),), {})
    writer = decide_lines.Writer(tmp_path / decide_lines.NAME, "errors")
    decide_errors.check(case, CPU, writer)
    (figure,) = decide_lines.figures(lines_in(tmp_path))
    assert (max(figure.by_round.values()) > 1) == wrong
    assert figure.facts["poisoned"] == 1
    assert len(set(figure.facts["seeds"])) == len(figure.by_round) == 2
