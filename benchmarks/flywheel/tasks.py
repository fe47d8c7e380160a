"""The flywheel's tasks: four kinds of text, three settings each, and the full menu of every setting.

A task's table holds the metric of every configuration on its menu, measured by `overnight`'s own GPT trainer
(`measure.py` remakes it). The held-out split was fixed in `heldout.json` before any student was tuned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from overnight.rails.menu import Knob, Menu

KINDS = ("python", "english", "records", "algebra")
SEEDS = (0, 1)
"""Every configuration runs on these."""
NOISE_SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
"""A subset runs on these; the spread around each configuration's mean is the task's noise."""
NOISE_CONFIGS = 32
LRS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
Choices = tuple[int | float, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """How the trials of a task run, whatever the text."""

    name: str
    trainer: Mapping[str, object]
    choices: Mapping[str, Choices]
    about: str


SETTINGS = (
    Setting(
        "tokens",
        {"tokens": 8192, "tokenizer": "byte", "seq_len": 64, "n_head": 2, "d_ff": 128, "beta1": 0.9},
        {
            "lr": LRS,
            "batch_size": (1, 2, 4, 8),
            "d_model": (16, 32, 64, 96),
            "n_layer": (1, 2, 3),
            "lr_warmup": (0, 6),
            "beta2": (0.9, 0.99),
        },
        "a trial sees a fixed number of tokens, so a larger batch takes fewer steps",
    ),
    Setting(
        "steps",
        {"steps": 40, "tokenizer": "byte", "batch_size": 8, "n_layer": 2, "n_head": 2, "d_model": 48, "beta2": 0.97},
        {
            "lr": LRS,
            "d_ff": (24, 48, 96, 192),
            "seq_len": (8, 16, 32, 64),
            "beta1": (0.5, 0.8, 0.95),
            "grad_clip": (0.2, 2.0),
            "lr_warmup": (0, 12),
        },
        "a trial takes a fixed number of steps, so longer sequences see more text",
    ),
    Setting(
        "bpe",
        {"tokens": 6144, "tokenizer": "bpe:512", "d_model": 64, "d_ff": 128, "n_layer": 1, "beta2": 0.97},
        {
            "lr": LRS,
            "batch_size": (2, 4, 8, 16),
            "seq_len": (8, 16, 32, 64),
            "n_head": (1, 2, 8),
            "weight_decay": (0.0, 0.3),
            "beta1": (0.6, 0.9),
        },
        "a learnt vocabulary of 512 pieces, a fixed number of tokens",
    ),
)
VAL_TOKENS = 8192
DEVICE = {"val_tokens": VAL_TOKENS, "device": "cpu", "threads": 1}


@dataclass(frozen=True, slots=True)
class Task:
    """One text under one setting."""

    kind: str
    setting: Setting

    @property
    def name(self) -> str:
        """Its name in files and tables."""
        return f"{self.kind}-{self.setting.name}"

    def trainer(self) -> dict[str, object]:
        """The `[trainer]` table of its trials; the texts lie below the campaign's folder."""
        return {**DEVICE, **self.setting.trainer, "data": f"{self.kind}/*.txt"}

    def configs(self) -> Iterator[dict[str, int | float]]:
        """Yield the whole menu, in a fixed order."""
        names = list(self.setting.choices)
        for values in itertools.product(*self.setting.choices.values()):
            yield dict(zip(names, values, strict=True))

    def menu(self, start: Mapping[str, int | float]) -> Menu:
        """The menu with `start` as its defaults."""
        return Menu(
            tuple(
                Knob(
                    name=name,
                    type="float" if any(isinstance(value, float) for value in values) else "int",
                    default=start[name],
                    choices=values,
                    low=None,
                    high=None,
                    scale="linear",
                    levels=2,
                    doc=DOCS[name],
                )
                for name, values in self.setting.choices.items()
            ),
            (),
            {},
        )


DOCS = {
    "lr": "AdamW peak learning rate",
    "batch_size": "sequences in a step",
    "d_model": "width of the model",
    "n_layer": "transformer blocks",
    "lr_warmup": "steps of linear warm-up before the cosine",
    "beta1": "AdamW's decay of gradients",
    "beta2": "AdamW's decay of squared gradients",
    "d_ff": "width of the feed-forward layer",
    "seq_len": "tokens in a sequence",
    "grad_clip": "largest norm of the gradient",
    "n_head": "attention heads",
    "weight_decay": "AdamW's decoupled weight decay",
}
TASKS = tuple(Task(kind, setting) for setting in SETTINGS for kind in KINDS)
