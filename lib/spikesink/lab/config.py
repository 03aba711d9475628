"""One run of the lab in one frozen dataclass: what the model is, what it is trained on, and how."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

BOS = 0  # the token that every window begins with
LAB = "lab"  # the ledger of the models that we train ourselves
LENGTH = 64  # tokens of the windows that every model is looked at: Gu et al.'s T
CHOICES = {
    "task": ("backcopy", "text"),
    "norm": ("pre", "sandwich", "sandwich_qk", "qk", "dynamic_tanh"),
    "ffn": ("swiglu", "gelu", "linear", "none"),
    "gate": ("none", "channel", "head", "token", "static"),
    "schedule": ("cosine", "constant"),
}
FROM_ZERO = ("seed", "weight_decay", "warmup", "skipped")  # numbers that may be 0


class ConfigError(ValueError):
    """A configuration that cannot be trained; the message is one sentence that says what would do."""


@dataclass(frozen=True)
class Config:
    """A model and its training. Widths in channels, lengths in tokens; `seed` draws the weights and the batches."""

    task: str = "text"  # what it is trained on: Bigram-Backcopy, or text
    d_vocab: int = 1024
    d_model: int = 128
    n_layers: int = 4
    heads: tuple[int, int] = (64, 2)  # d_head, and how many of them
    norm: str = "pre"  # RMSNorm before each block ("pre"), after it too ("sandwich"), of queries and keys ("qk"), ...
    embedding: float = 0.02  # standard deviation that embeddings begin with
    ffn: str = "swiglu"
    gate: str = "none"  # sigmoid on what the heads give: one a channel, a head or a token; "static" sees no input
    bos: bool = True  # whether windows begin with BOS
    lengths: tuple[int, int] = (32, 128)  # shortest and longest window; a batch has one length, a power of two times it
    skipped: float = 0.0  # share of each window, at its beginning, that is context alone: not trained to be predicted
    batch: int = 2048  # tokens a step, of all processes together
    steps: int = 5000
    learning_rate: float = 3e-3
    schedule: str = "cosine"  # down to a tenth, or constant; both after a warm-up
    warmup: int = 100  # steps
    weight_decay: float = 0.1  # of matrices, embeddings as well; norms, biases and static gates are left alone
    beta2: float = 0.95
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            self._check(field.name, getattr(self, field.name), field.default)
        shortest, longest = self.lengths
        powers = doubled(shortest, longest)
        for name, wrong, allowed in (
            ("heads", self.d_head % 2, "an even number of channels, which are rotated in pairs"),
            ("lengths", shortest < 2 or longest not in powers, "2 or more, and a double, fourfold, ... of it"),
            ("lengths", longest < LENGTH, f"{LENGTH} or more as the longest, for models are looked at such windows"),
            ("batch", self.batch % longest, f"a multiple of the longest window, {longest}"),
            ("beta2", self.beta2 >= 1, "less than 1"),
            ("skipped", self.skipped >= 1, "less than 1"),
        ):
            if wrong:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give {allowed}.")

    def _check(self, name: str, value: Any, default: Any) -> None:
        """Refuse a value of another type than the default's, or below what the field allows."""
        if isinstance(default, bool):
            return
        if isinstance(default, str):
            allowed, there = f"one of {', '.join(CHOICES[name])}", value in CHOICES[name]
        else:
            least = 0 if name in FROM_ZERO else 1e-12 if isinstance(default, float) else 1
            numbers = value if isinstance(value, tuple) else (value,)
            allowed = f"no less than {least:g}"
            there = all(type(number) in (int, float) and number >= least for number in numbers)
        if not there:
            raise ConfigError(f"{name} is {value!r}; give {allowed}.")

    @property
    def d_head(self) -> int:
        """Channels of a head."""
        return self.heads[0]

    @property
    def n_heads(self) -> int:
        """Heads of a layer."""
        return self.heads[1]

    @property
    def d_mlp(self) -> int:
        """Hidden neurons: SwiGLU's three matrices have as many weights as two of width 4 d_model, in whole eights."""
        if self.ffn == "none":
            return 0
        return round(self.d_model / 3) * 8 if self.ffn == "swiglu" else 4 * self.d_model

    @property
    def key(self) -> str:
        """Twelve digits that two configurations share only when they are the same."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Config":
        """The configuration that `asdict` wrote, after a trip through JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def doubled(shortest: int, longest: int) -> tuple[int, ...]:
    """The shortest, twice that, and so on, up to the longest."""
    return tuple(shortest << i for i in range((longest // shortest).bit_length()))
