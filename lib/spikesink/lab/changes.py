"""How a variant differs from what it is compared with, and whether that is the paper's way: what findings give."""

import math
from dataclasses import dataclass, replace

from spikesink import paper
from spikesink.lab.families import AGAINST, BASE, FAMILY

AGREES, DIFFERS, UNDECIDED = "agree", "differ", "undecided"
LATE = ", late queries"  # added to the name of what is seen by those alone
BANDS = {"sink": 0.05, "spike": math.log(1.5), "relative": math.log(1.5)}  # changes that count as none


@dataclass(frozen=True)
class Change:
    """The change of one quantity, with its 95% interval over seeds.

    `quantity` is "sink" (sink ratio: a difference), "spike" (largest activation: the log of a ratio) or "relative" (the
    same over the stream's median).
    """

    quantity: str
    value: float
    low: float
    high: float
    paper: str | None  # "up", "down", "stays" or `paper.AT_LEAST`; None where the paper does not say
    room: bool = True  # whether there is enough to begin with for less of it to be seen
    others: tuple["Change", ...] = ()  # of the sink ratio, the same by `EPSILONS`

    @property
    def interval(self) -> tuple[float, float, float]:
        """The value, and the ends of its interval."""
        return self.value, self.low, self.high

    @property
    def kind(self) -> str:
        """What the paper says: that sinks or activations rise, fall or stay."""
        what = "sinks" if self.quantity == "sink" else "activations"
        return f"{what} that {({'up': 'rise', 'down': 'fall'}).get(self.paper, 'stay')}"

    @property
    def outcome(self) -> str | None:
        """Whether the change goes the paper's way; None where the paper says nothing.

        Where the paper's value moves, the interval must exclude zero to agree; where it stays, the interval must lie
        within the band. It differs where the interval allows nothing but something else. Undecided is everything else,
        what another threshold of a sink contradicts, and less of what hardly is there to begin with.
        """
        return None if self.paper is None else UNDECIDED if self.contradicted else self._outcome_alone

    @property
    def contradicted(self) -> bool:
        """Whether the value by another threshold of a sink, where there are any to lose, says something else."""
        alone = self._outcome_alone
        return alone != UNDECIDED and not all(other.nothing_to_lose or other._allows(alone) for other in self.others)

    @property
    def nothing_to_lose(self) -> bool:
        """Whether there is too little to see it fall, or stay."""
        return not self.room and self.paper != "up"

    def _allows(self, outcome: str) -> bool:
        """Whether the value without its interval is compatible with an outcome."""
        if outcome == DIFFERS and self.paper in ("up", "down") and abs(self.value) <= BANDS[self.quantity]:
            return True  # hardly any change, which is less than the paper's
        return replace(self, low=self.value, high=self.value)._outcome_alone == outcome

    @property
    def _outcome_alone(self) -> str:
        band = BANDS[self.quantity]
        stays = -band <= self.low and self.high <= band
        if self.nothing_to_lose or self.paper is None:
            return UNDECIDED
        if self.paper == paper.AT_LEAST:
            return AGREES if self.low >= -paper.MAY_FALL else DIFFERS if self.high < -paper.MAY_FALL else UNDECIDED
        if self.paper == "stays":
            return AGREES if stays else DIFFERS if self.low > band or self.high < -band else UNDECIDED
        low, high = (self.low, self.high) if self.paper == "up" else (-self.high, -self.low)
        return AGREES if low > 0 else DIFFERS if high < 0 or stays else UNDECIDED


@dataclass(frozen=True)
class Compared:
    """A variant beside what it is compared with: means over seeds (geometric ones of activations), and changes."""

    name: str
    loss: float
    sink_ratio: float
    attention: float  # mean sink score of position 0, which no epsilon cuts
    max_activation: float
    over_median: float  # the largest activation over the stream's median
    over_elsewhere: float  # position 0's largest entry over the largest elsewhere
    seeds: int
    late: bool  # whether loss and sinks are of late queries alone
    sink_at_loss: tuple[float, ...]  # sink ratio of each run it is compared with, when its loss was this one's
    sink: Change
    spike: Change
    relative: Change

    @property
    def title(self) -> str:
        """The name, with what it is compared with where that is not the base."""
        return title_of(self.name, self.late)


def title_of(name: str, late: bool = False) -> str:
    """A variant's name, with what it is compared with where that is not the base."""
    return name if AGAINST.get(name, BASE) == BASE else f"{name} (against {AGAINST[name]}{LATE * late})"


def direction(name: str, quantity: str, worse: bool = True) -> str | None:
    """Which way the paper's variant goes against its base; None where it does not say.

    `worse` is whether training went worse than the base's here: some of what the paper says is of bad training only.
    """
    if quantity == "relative":
        return None
    i = ("sink", "spike").index(quantity)
    value, base = paper.TRAINED_VARIANTS[FAMILY[name]].get(name, (None, None))[i], paper.TRAINED_BASE[i]
    if value == paper.DOWN_IF_WORSE:
        return "down" if worse else None
    if value is None or isinstance(value, str):
        return value
    moved = value - base if quantity == "sink" else math.log(value / base)
    return "stays" if abs(moved) <= BANDS[quantity] else "up" if moved > 0 else "down"
