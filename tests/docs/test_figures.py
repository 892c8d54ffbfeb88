"""No page has a measured figure that was typed: tables and figures come from committed data."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each of these was written by the script that its first lines name.
OUTPUTS = {"results.md", "merging.md", "one_rate.md"}
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in OUTPUTS)

NUMBER = r"\d[\d,]*(?:\.\d+)?"
TIMES = r"(?:[nµum]?s|min|h|(?:milli|micro)?seconds?|minutes?|hours?)"
SIZES = r"(?:[kKMGT]i?B(?:/s)?|[MGTP]FLOPS?(?:/s)?)"
PARTS = r"(?:times|[\u00d7x](?! ?\w)|%|percent|points?|of (?:the time|LoRA|a copy))"
MEASURED = re.compile(
    rf"(?<![\w.]){NUMBER}(?: (?:±|to|and|or) {NUMBER})* ?(?:{TIMES}|{SIZES}|{PARTS})(?![\w/-])"
)
CELL = re.compile(r"(?<=\|) *\**\d[\d,]*\.\d+\**(?: ± [\d.]+)? *(?=\|)")
# Parts of a page that come from data, or are no sentences.
FILLED = [
    re.compile(r"^<!-- table: [\w-]+ -->\n.*?^<!-- end of table -->$", re.DOTALL | re.MULTILINE),
    re.compile(r"^<!-- ([\w-]+) -->\n.*?^<!-- /\1 -->$", re.DOTALL | re.MULTILINE),  # docs/paper
    re.compile(r"<!-- figure: [\w-]+ -->.*?<!-- /figure -->"),
    re.compile(r"`[^`\n]+`"),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"\$[^$\n]+\$"),
    re.compile(r"\]\([^)]*\)"),
]

# Code, of which only the comments are read.
CODE = re.compile(r"^```.*?^```$|^    [^\n]*$", re.DOTALL | re.MULTILINE)

# Figures that nobody measured: page -> phrase of it -> reason.
EXEMPT = {
    "README.md": {"3 to 7 min on 2 cores": "an estimate, with the time to set it up"},
    "docs/benchmarks.md": {
        "x takes 8 MiB in float32": "the size of the operand",
        "a value above 100 % of the floor": "a bound",
    },
    "docs/cuda.md": {
        "16 KB forward and 48 KB backward": "memory that the kernels ask for",
        "45 to 60 µs forward: 194 MB at the 3.6 TB/s": "a prediction",
        "the prediction is 110 to 200 µs": "a prediction",
        "1.2 to 1.6 copies, 40 to 55 µs": "a prediction",
        "1.8 to 2.4 copies, 60 to 80 µs": "a prediction",
        "memory: 48 KiB": "memory that a kernel reads and writes",
        "shared memory: 112 KiB": "memory that a kernel reads and writes",
        "201 MB of rows and 38 MB of partial sums are 60 µs": "a prediction",
        "the prediction is 45 to 60 µs": "a prediction",
        "which is 76 µs at the least": "a prediction",
        "All three take 96 KiB": "memory that the kernels ask for",
    },
    "docs/interop.md": {"outputs of 8 MiB": "the size of the operand"},
    "docs/kernels.md": {
        "rounded rates of two CPU cores: 100 GB/s and 200 GFLOP/s": "assumed by the example",
        "the same 128 MiB": "the size of the operand",
        "227 KiB on an H200": "a limit of the hardware",
    },
    "docs/layers.md": {"measure that within 10 %": "the tolerance of a test"},
    "docs/linear.md": {"undo changes below 0.4 %": "the precision of bfloat16"},
    "docs/paper/tables.md": {"(0.1245 % and 0.249 %; printed": "a share by definition"},
    "docs/troubleshooting.md": {"each rounding is up to 0.4 %": "the precision of bfloat16"},
    "docs/tuning.md": {
        "64 MiB on a CPU": "a size that the code sets",
        "8.5 minutes, into build/gpu-decide": "the default of --minutes",
        # tests/bench/test_gpu_verdicts.py compares these with the rules
        **{
            f"at most {bound}": "the threshold of a rule"
            for bound in ("0.75 of LoRA", "0.85 of LoRA", "1.01 times", "1.02 times", "75 us",
                          "1.20 times", "1.10 times", "1.5 times")
        },
        **{f"at least {share}%": "the threshold of a rule" for share in (80, 88, 90)},
    },
}  # fmt: skip


def comments(code):
    """Take everything but the comments from code; lines keep their numbers."""
    return "\n".join(line.partition("#")[2] for line in code[0].split("\n"))


def sentences(text):
    """Take from a page all that comes from data or is no sentence; lines keep their numbers."""
    text = CODE.sub(comments, text)
    for part in FILLED:
        text = part.sub(lambda match: "\n" * match[0].count("\n"), text)
    return text


def typed(text, exempt=()):
    """List (line, figure) of the measured-looking figures in the sentences of a page."""
    text = sentences(text)
    for phrase in exempt:
        text = text.replace(phrase, "")
    lines = enumerate(text.splitlines(), 1)
    return [
        (i, m[0].strip()) for i, line in lines for p in (MEASURED, CELL) for m in p.finditer(line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_figure_is_typed(page):
    """Mark it (CONTRIBUTING.md, Documentation), leave it out, or say in EXEMPT what else it is."""
    exempt = EXEMPT.get(page.relative_to(ROOT).as_posix(), {})
    text = page.read_text()
    assert [phrase for phrase in exempt if phrase not in sentences(text)] == []
    assert typed(text, exempt) == []


def test_every_exempt_phrase_has_a_figure():
    assert EXEMPT.keys() <= {page.relative_to(ROOT).as_posix() for page in PAGES}
    for phrases in EXEMPT.values():
        for phrase in phrases:
            assert typed(phrase), phrase


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One core takes 0.113 ms, 96 % of the limit.", ["0.113 ms", "96 %"]),
        ("It reaches 4.0 TB/s and 782 TFLOP/s.", ["4.0 TB/s", "782 TFLOP/s"]),
        ("It takes 0.85 to 0.92 of the time.", ["0.85 to 0.92 of the time"]),
        ("It gains 0.18 ± 0.09 points.", ["0.18 ± 0.09 points"]),
        ("It is 5 to 35 times as fast.", ["5 to 35 times"]),
        ("| BOFT(2, 8) | 972 | 1.30 |", ["1.30"]),
        ("| LoRA | **84.0** | 76.4 ± 1.3 |", ["**84.0**", "76.4 ± 1.3"]),
        ("```\ntime: 8 ms\n```\ntext of 3 s", ["3 s"]),
        ("    make demo 5 s   # takes 5 min\n", ["5 min"]),
        ("```python\nf(8 * 1 % 2)  # 9 µs\n```\n", ["9 µs"]),
        ("`sleep 3 s`, $5 s$, [2 s](#2-s) and 768 x 768", ["2 s"]),
        ("<!-- table: x -->\n| 1.30 | 8 ms |\n<!-- end of table -->\n7 µs", ["7 µs"]),
        ("It takes <!-- figure: x -->8<!-- /figure --> ms, not 9 ms.", ["9 ms"]),
        ("torch 2.10, 4096 features, BOFT(2, 8), 2 factors, b = 8", []),
    ],
)  # fmt: skip
def test_the_scan_finds_what_is_typed(text, found):
    assert [figure for _, figure in typed(text)] == found
