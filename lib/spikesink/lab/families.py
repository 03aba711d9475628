"""The six families: variants that differ from their tier's base, or from one another, in one field each."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from spikesink.lab.config import Config

BASES = {
    "task": Config(
        task="backcopy", d_vocab=64, d_model=64, n_layers=3, heads=(32, 2), batch=4096, steps=1000, learning_rate=1e-2
    ),
    "text": Config(),
    "large": Config(
        d_vocab=16384,
        d_model=768,
        n_layers=12,
        heads=(64, 12),
        lengths=(64, 1024),
        batch=2**17,
        steps=2500,
        learning_rate=6e-4,
        warmup=250,
    ),
}
BASE = "base"
LARGE, LONGEST = "embeddings of 1", "only the longest"  # variants that others are variants of
WITHOUT_BOS = "no BOS"
SEEDS = 3


@dataclass(frozen=True)
class Variant:
    """One change: a `field` of a configuration, and its value as a function of what it was.

    `against` names what is changed and what the variant is compared with: the base, or another variant.
    """

    family: str
    name: str
    field: str
    value: Callable[[Config], Any]
    against: str = BASE
    headline: bool = False  # three seeds at every tier
    kept: bool = True  # its weights, if it is a headline

    def config(self, base: Config) -> Config:
        """The variant of a tier with this base."""
        changed = next((other.config(base) for other in VARIANTS if other.name == self.against), base)
        return replace(changed, **{self.field: self.value(getattr(changed, self.field))})


@dataclass(frozen=True)
class Planned:
    """A run that belongs to a tier."""

    tier: str
    name: str
    config: Config

    @property
    def label(self) -> str:
        """The name of its files: the variant's, with nothing in it that a file system minds, and the seed."""
        return f"{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}-{self.config.seed}"


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: type(value)(value * factor)


def _is(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _heads(width: float, number: float) -> Callable[[tuple[int, int]], tuple[int, int]]:
    return lambda heads: (int(heads[0] * width), int(heads[1] * number))


VARIANTS = (
    Variant("optimization", "learning rate / 3", "learning_rate", _times(1 / 3)),
    Variant("optimization", "learning rate x 3", "learning_rate", _times(3.0)),
    Variant("optimization", "no weight decay", "weight_decay", _is(0.0), headline=True),
    Variant("optimization", "weight decay x 5", "weight_decay", _times(5.0)),
    Variant("optimization", "beta2 0.8", "beta2", _is(0.8)),
    Variant("optimization", "beta2 0.999", "beta2", _is(0.999)),
    Variant("optimization", "constant rate", "schedule", _is("constant")),
    Variant("optimization", "half the steps", "steps", _times(1 / 2)),
    Variant("optimization", "twice the steps", "steps", _times(2.0)),
    Variant("ffn", "GeLU", "ffn", _is("gelu")),
    Variant("ffn", "linear", "ffn", _is("linear")),
    Variant("ffn", "attention only", "ffn", _is("none"), headline=True),
    # A sandwich norm makes every write as large as 1 from the first step, which drowns embeddings of 0.02, and
    # DynamicTanh does not bring a small stream to size: so they begin with 1, as in public models of both kinds.
    Variant("normalization", LARGE, "embedding", _is(1.0), headline=True, kept=False),
    Variant("normalization", "sandwich", "norm", _is("sandwich"), LARGE, headline=True),
    Variant("normalization", "sandwich + QK norm", "norm", _is("sandwich_qk"), LARGE),
    Variant("normalization", "DynamicTanh", "norm", _is("dynamic_tanh"), LARGE, headline=True),
    Variant("normalization", "QK norm", "norm", _is("qk")),
    # This one, the static gate and contexts from 1/4 and 1/2 on have three seeds, for one run alone decided what is
    # asked of them, or left it open.
    Variant("heads", "d_head / 4, 4 times as many", "heads", _heads(1 / 4, 4.0), headline=True, kept=False),
    Variant("heads", "d_head / 2, twice as many", "heads", _heads(1 / 2, 2.0)),
    Variant("heads", "d_head x 2, half as many", "heads", _heads(2.0, 1 / 2)),
    Variant("heads", "d_head / 8", "heads", _heads(1 / 8, 1.0), headline=True),
    Variant("heads", "d_head / 2", "heads", _heads(1 / 2, 1.0)),
    Variant("gates", "gate per channel", "gate", _is("channel"), headline=True),
    Variant("gates", "gate per head", "gate", _is("head"), headline=True),
    Variant("gates", "gate per token", "gate", _is("token")),
    Variant("gates", "static gate", "gate", _is("static"), headline=True, kept=False),
    Variant("context", LONGEST, "lengths", lambda lengths: (lengths[1], lengths[1]), headline=True),
    Variant("context", "half as long", "lengths", lambda lengths: (lengths[1] // 2, lengths[1] // 2), LONGEST),
    Variant("context", "contexts from 1/4 on", "skipped", _is(1 / 4), LONGEST, headline=True, kept=False),
    Variant("context", "contexts from 1/2 on", "skipped", _is(1 / 2), LONGEST, headline=True, kept=False),
    Variant("context", WITHOUT_BOS, "bos", _is(False)),
)
FAMILIES = tuple(dict.fromkeys(variant.family for variant in VARIANTS))
FAMILY = {variant.name: variant.family for variant in VARIANTS}
AGAINST = {variant.name: variant.against for variant in VARIANTS}


def planned(tier: str) -> Iterator[Planned]:
    """The runs of a tier, those that say most first: the base, all variants once, then the other seeds.

    Every variant of the task tier has three seeds; of the others the base and the headline ones.
    """
    base = BASES[tier]
    yield from (Planned(tier, BASE, replace(base, seed=seed)) for seed in range(SEEDS))
    for seed in range(SEEDS):
        for variant in sorted(VARIANTS, key=lambda variant: not variant.headline):
            if seed == 0 or variant.headline or tier == "task":
                yield Planned(tier, variant.name, variant.config(replace(base, seed=seed)))
