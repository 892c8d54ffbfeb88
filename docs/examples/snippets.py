"""The labeled sentences of the demo: reading, removal of copies, and splits."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

SPLIT_SEED = 20231110  # fixed, so that every run, method and seed uses the same three splits
TEST, VALIDATION, TRAIN = 2000, 1000, 2000


@dataclass(frozen=True)
class Split:
    """Sentences with their labels: 1 for a positive rating, 0 for a negative one."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


def normal_form(text: str) -> str:
    """Reduce a sentence to its words, without case or punctuation, to compare copies."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_snippets(path: Path, threshold: float = 1.0) -> list[tuple[str, int]]:
    """Read (sentence, label) pairs, without sentences whose label is uncertain.

    Mean ratings go from -4 to 4. Sentences with a rating within `threshold` of 0 are left out,
    because their label is noise. Of several copies of a sentence only the first is kept, so that no
    sentence is in two splits. A sentence whose copies have different labels is dropped.

    Raises:
        ValueError: a line does not have three fields.
    """
    unique: dict[str, tuple[str, int]] = {}
    contradicted = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"{path.name}, line {number}: expected 3 fields, got {len(fields)}")
        rating, text = float(fields[1]), " ".join(fields[2].split())
        key, label = normal_form(text), int(rating > 0)
        if abs(rating) <= threshold or not key:
            continue
        if unique.setdefault(key, (text, label))[1] != label:
            contradicted.add(key)
    return [pair for key, pair in unique.items() if key not in contradicted]


def make_splits(
    pairs: list[tuple[str, int]],
    train: int = TRAIN,
    validation: int = VALIDATION,
    test: int = TEST,
) -> tuple[Split, Split, Split]:
    """Make disjoint train, validation and test splits, the same in every run.

    Test and validation are taken first, so that the size of the training split does not change
    them.

    Raises:
        ValueError: there are too few sentences.
    """
    if len(pairs) < train + validation + test:
        room = len(pairs) - validation - test
        raise ValueError(f"train: expected at most {room} of {len(pairs)} sentences, got {train}")
    # Sorting makes the splits independent of the order of the sentences in the file.
    order = sorted(pairs)
    random.Random(SPLIT_SEED).shuffle(order)
    cuts = order[:test], order[test : test + validation], order[test + validation :][:train]
    held_out, held_in, training = (Split([t for t, _ in c], [y for _, y in c]) for c in cuts)
    return training, held_in, held_out
