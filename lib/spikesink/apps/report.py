"""A report on a model for its owner: where its spike and its sinks are, and what that means for serving it.

`diagnose` measures stage by stage, and writes what is finished after each: `report.json`, and `report.html`, one page
that needs nothing else.
"""

import base64
import html
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink import plots
from spikesink.apps.notebook import say
from spikesink.chain import collapse, keys, sinks, trace
from spikesink.chain.lifecycle import Lifecycle, find_lifecycle
from spikesink.chain.trace import trace_windows
from spikesink.common import NotApplicable, brief, write_atomically, writing_to
from spikesink.ledger import evidence
from spikesink.ledger.claims import Evidence
from spikesink.model import texts
from spikesink.patching import cuts
from spikesink.serving import cache, cells, context, diagnosis, long, quantize

FEW_BLOCKS = 0.8  # of a spike, that some blocks write for it to be said to be theirs (LC1)


HEADS = 8  # that are listed, the strongest first


SCHEMA = 1


TITLES = {
    "spike": "The spike",
    "sink": "The sinks",
    "quantization": "Eight and four bits",
    "cache": "A KV cache that forgets",
    "long": "Long contexts",
}


# How a kind of failure is said in short, and what helps; the keys are the words of a diagnosis.
HELPS = {
    diagnosis.OUTLIERS: (
        "Activation outliers, all or in part",
        "Give each token a step of its own, or keep the spike's channels out of the quantizer.",
    ),
    diagnosis.ROUTING: (
        "Attention routing, all or in part",
        "Keep the first token's key and value: in the cache, and in full precision (where weights are rounded, as the "
        "unrounded weights made them).",
    ),
    diagnosis.MISMATCH: (
        "Neither remedy helps",
        "Finer steps, or a larger budget; what the model was not trained for, it cannot do.",
    ),
    diagnosis.OPEN: ("Cause left open", ""),
    diagnosis.UNKNOWN: ("Costs something, not taken apart", ""),
}


REMEDIES = (quantize.APART, *map(cache.named, cache.FIRST), cache.CONSTANT)  # two of them in short


CONTROLS = (quantize.OTHERS_APART, cache.OTHERS)


REMEDY, NOT_SURE = "With a remedy", f"{diagnosis.UNSURE.capitalize()}, on so few windows"


WORDS = {
    "Spike": "an entry of the residual stream hundreds or thousands of times larger than the median one; on a few "
    "tokens, in a few channels. Blocks are counted from 1, attention odd and FFN even; layers and "
    "heads from 0, so block 24 is the FFN of layer 11.",
    "Sink": f"a token, nearly always the first, that gets more than {trace.EPSILON} of the attention of many heads.",
    "Times": "perplexity with a technique over that without it, on the same windows, with Student's 95% interval.",
    "Left without the spike": "100% less the share of that cost, in nats, which goes when the spike is removed from a "
    "model whose sinks are already held in place by constants. Where tokens share no step, others see of a spike token "
    f"its key and value alone, so that its removal adds nothing: {diagnosis.AS_HELD}.",
    "Left with the sink kept or held": "the share that stays when the first token's key and value are spared by the "
    "technique, or put in their place. Above 100% the remedy does harm of its own.",
    "Diagnosis": f"{diagnosis.OUTLIERS}, where the cost goes with the spike: at most {diagnosis.GONE:.0%} is left "
    f"without it; {diagnosis.ROUTING}, where it goes when the sink is kept: as little is left then; at least in part, "
    f"where at most {diagnosis.PART:.0%} is left; {diagnosis.MISMATCH}, where more is left with both, and no cause is "
    f"named; each at both ends of the share's interval, else {diagnosis.OPEN}. A cost of which the interval reaches 2% "
    f"is {diagnosis.UNSURE}, one below {diagnosis.FINE}. What is a remedy or a control itself, and surely costs "
    f"something, is {diagnosis.UNKNOWN}.",
    "The last ones, with the first, with heavy hitters": "the tokens that a cache keeps for a query: its budget's last "
    "ones alone; the first (or first 2, 4, 8) among them; half of them those that have got the most attention so far. "
    "With a constant sink: a constant key and value for each head in the first one's place. With 4 others: a control, "
    "four ordinary tokens in the place of the first.",
    "Spike channels apart": "those channels are not rounded in which spike tokens have more than any other token has "
    "anywhere. As many others apart: a control, those in which other tokens have most.",
    "The picture of entries": "what matrices read, layer by layer, beside stream and KV cache. Mixed values are "
    "what heads have gathered, before the output projection; the FFN's hidden is what its down projection reads. Where "
    "the line of spike tokens is above that of others, they set the range; what lies in the blue area int8 per tensor "
    "rounds to zero.",
    "A step a tensor, a token, a channel": "over what a quantizer shares one step: the larger the largest entry, the "
    "coarser the step.",
}


EXPLAINED = "notebooks/10_serving.ipynb of spikesink explains what is measured, and how."


TEXTS = {"house": "spikesink's own prose, in English", "pydoc": "Python's documentation of its language"}


NOT_TESTED = (
    "the speed of anything: what is rounded or forgotten here is simulated",
    "ranges that are fixed beforehand (static quantization), and training with a remedy",
    "any other text, and anything beyond perplexity and the recall of one sentence",
)


@dataclass(frozen=True)
class Section:
    """One part of a report: what it says, the numbers behind it, and a table and a picture where there are some."""

    key: str
    prose: str
    facts: Mapping[str, Any]
    table: pd.DataFrame | None = None
    picture: Figure | None = field(default=None, repr=False)
    narrow: tuple[str, ...] = ()  # those of the table's columns that a terminal has room for; by default all
    short: str = ""  # what of the prose comes first in the report


@dataclass(frozen=True)
class Subject:
    """A model, and the windows that it is looked at on."""

    model: TransformerBridge
    source: str
    tokens: Int[Tensor, "n length"]
    seed: int

    @cached_property
    def life(self) -> Lifecycle:
        """Its spike's life in these windows."""
        return find_lifecycle(trace_windows(self.model, self.tokens, self.seed))

    @cached_property
    def known(self) -> cuts.SpikeMeans | NotApplicable:
        """What spike tokens are on average, over windows that are then not judged."""
        (held_out, where), _ = cuts.split_windows(self.life, length=self.short)
        return cuts.spike_means(self.model, held_out, self.life, where)

    @property
    def short(self) -> int:
        """The length of windows that are run many times."""
        return max(4, self.tokens.shape[1] // 4)


def diagnose(
    model: TransformerBridge,
    source: str,
    tokens: Int[Tensor, "n length"],
    out: Path,
    with_long: bool = False,
    seed: int = 0,
    begun: Callable[[str], None] = lambda title: None,
) -> Iterator[Section]:
    """Look at a model, a section at a time; when one is yielded, `out/report.json` and `out/report.html` hold it.

    Args:
        model: as `load` returns it.
        source: the text that `tokens` are cut from.
        tokens: windows.
        out: a folder.
        with_long: whether to run a text as long as the context, which takes minutes.
        seed: of what is drawn.
        begun: is told before each section is measured which it is, and after what time.

    Raises:
        OSError: the folder cannot be written.
    """
    of, done, started = Subject(model, source, tokens, seed), {}, time.perf_counter()
    stages = STAGES if with_long else {key: stage for key, stage in STAGES.items() if key != "long"}
    about = {
        "model": model.source.spec,
        "sha256": model.source.sha256,
        "text": source,
        "windows": f"{len(tokens)} of {tokens.shape[1]} tokens",
    }
    untold = [f"{site} in fewer bits: this model does not show it" for site in quantize.not_rounded(model)]
    for number, (key, stage) in enumerate(stages.items(), 1):
        minutes, seconds = divmod(round(time.perf_counter() - started), 60)
        begun(f"{number} of {len(stages)}: {TITLES[key]} (begun after {minutes}:{seconds:02})")
        done[key] = stage(of)
        left = [f"{TITLES[other]} (not measured)" for other in TITLES if other not in done] + untold + [*NOT_TESTED]
        seconds = {"seconds": round(time.perf_counter() - started)}
        _write(out, model.source.slug, about | seconds, done, left)
        yield done[key]


def _write(out: Path, name: str, about: Mapping[str, Any], done: Mapping[str, Section], left: list[str]) -> None:
    found = {"schema": SCHEMA, **about, "sections": {key: one.facts for key, one in done.items()}, "not_tested": left}
    with writing_to(out):
        write_atomically(out / "report.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        write_atomically(out / "report.html", page(name, about, done, left))


def _facts(evidence: Evidence | NotApplicable) -> dict[str, Any]:
    return dict(evidence.measured) if isinstance(evidence, Evidence) else {"reason": evidence.reason}


def _said(template: str, evidence: Evidence | NotApplicable | Mapping[str, Any], **more: Any) -> str:
    if isinstance(evidence, NotApplicable):
        return f"{evidence.reason[0].upper()}{evidence.reason[1:]}."
    return say(template, evidence, **more).data.replace("\n", " ")


def _spike(of: Subject) -> Section:
    life = of.life
    up, down = evidence.lc1_step_up(life), evidence.lc3_step_down(life)
    share = up.measured["share_written"] if isinstance(up, Evidence) else 1.0
    channels, tokens = evidence.lc4_few_channels(life), evidence.lc7_few_tokens(life, of.model.tokenizer.decode)
    if life.main is None:
        none = f"No spike: {life.reason}."
        return Section("spike", none, {"reason": life.reason}, short=none)
    prose = [
        _said(
            "The spike reaches {plateau_value}, in channel(s) {channels}. {step_up_blocks} write "
            "{share_written:.0%} of it"
            + ("." if share >= FEW_BLOCKS else ", the other {rest:.0%} come from other blocks."),
            up,
            rest=1 - share,
        ),
        _said("It is taken back by block(s) {step_down_blocks} ({share_cancelled:.0%} of it).", down),
        _said(
            "{n_spike_channels} of {d_model} channels spike, the largest with {top_over_median} times the median entry "
            "of all tokens there.",
            channels,
        ),
        _said(
            "{n_spike_tokens} tokens spike, {spike_token_share:.2%} of all; the first one in {position0_share:.0%} of "
            "the windows. The commonest: {commonest}.",
            tokens,
            commonest=", ".join(map(repr, _facts(tokens).get("spike_tokens", ()))),
        ),
    ]
    facts = {"LC1": _facts(up), "LC3": _facts(down), "LC4": _facts(channels), "LC7": _facts(tokens)}
    return Section("spike", " ".join(prose), facts, picture=plots.magnitudes(life), short=prose[0])


def _sink(of: Subject) -> Section:
    collapsed = collapse.measure_collapse(of.model, of.tokens, of.life, of.seed)
    seen = keys.read_attention(of.model, of.tokens, of.life, collapsed, seed=of.seed)
    many, others = evidence.sk1_many_heads(seen.scores), evidence.x_sk9_secondary(seen)
    mean = seen.scores.at.mean(0)  # layer, head
    order = mean.flatten().argsort(descending=True)[:HEADS].tolist()
    strongest = [(i // mean.shape[1], i % mean.shape[1]) for i in order]
    rows = [(layer, head, f"{float(mean[layer, head]):.0%}") for layer, head in strongest]
    table = pd.DataFrame(rows, columns=["layer", "head", "attention to position 0"]).set_index("layer")
    prose = [
        _said(
            "In {sink_ratio:.0%} of heads and windows the first token gets more than {epsilon} of the attention, and "
            "{mean_attention:.0%} of all attention on average.",
            many,
        ),
        _said("{n_tokens} other tokens are secondary sinks, in layers {first_layer} to {last_layer}.", others),
    ]
    short = sinks.score(of.model, of.tokens, length=of.short)
    facts = {"SK1": _facts(many), "X-SK9": _facts(others)}
    return Section("sink", " ".join(prose), facts, table, plots.sink_map(seen.scores, short))


def _quantization(of: Subject) -> Section:
    held_out, (tokens, where) = cuts.split_windows(of.life, length=of.short)
    ranges = quantize.ranges(of.model, *held_out)
    in_cells = cells.cells(of.known, where)
    crossed = cells.cross(of.model, tokens, in_cells, quantize.activations(of.model, ranges, where), where)
    crossed = quantize.weights(of.model, tokens, in_cells, crossed)
    return _told("quantization", crossed, plots.quantizer_steps(ranges))


def _cache(of: Subject) -> Section:
    _, (tokens, where) = cuts.split_windows(of.life, length=of.tokens.shape[1])
    budget = max(8, tokens.shape[1] // 4)
    techniques = cache.evictions(of.model, of.known, budget, where, of.seed)
    crossed = cells.cross(of.model, tokens, cells.cells(of.known, where), techniques, where)
    filler = texts.all_ids(of.model, of.source)
    recalled = context.recall(of.model, filler, tokens.shape[1], budget, seed=of.seed)
    found = _told("cache", crossed, plots.recalled(recalled))
    if isinstance(recalled, NotApplicable):
        return found
    gained = {name: {f"{depth:g}": x for depth, x in row.items()} for name, row in recalled.gained.items()}
    facts = {**found.facts, "recall": gained}
    prose = (
        f"{found.prose} Windows have {tokens.shape[1]} tokens, a query at most {budget} keys. The picture is of a fact "
        "that is told at some depth and asked for in the end: how many nats likelier the answer is than where another "
        "was told."
    )
    return replace(found, prose=prose, facts=facts)


def _told(key: str, crossed: cells.Crossed | NotApplicable, picture: Figure) -> Section:
    """A section about techniques in cells."""
    if isinstance(crossed, NotApplicable):
        return Section(key, f"Not tried: {crossed.reason}.", {"reason": crossed.reason})
    found = diagnosis.diagnose(crossed)
    facts = {
        name: {
            "cost": one.cost,
            "interval": _numbers(one.interval),
            **_left("without_spike", one.without_spike),
            **_left("with_sink", one.with_sink),
            "verdict": one.verdict,
        }
        for name, one in found.items()
    }
    tried, unsure = _tried(facts)
    risks = [
        f"{_called(name)} ({fact['cost']:.2f} times: {fact['verdict']})"
        for name, fact in tried.items()
        if diagnosis.surely(fact["verdict"])
    ]
    prose = [
        f"Tried in the model as it is alone: {crossed.reason}." if crossed.reason else "",
        f"Perplexity as it is: {brief(crossed.perplexity(crossed.plain[cells.AS_IT_IS]))}.",
        f"What costs more than 2%: {'; '.join(risks)}."
        if risks
        else "Nothing that was tried surely costs more than 2%.",
        _listed(NOT_SURE, unsure),
        _listed(REMEDY, {name: fact for name, fact in facts.items() if name in REMEDIES}),
    ]
    narrow = ("perplexity, times", "diagnosis")
    return Section(key, " ".join(filter(None, prose)), facts, diagnosis.diagnoses(found), picture, narrow)


def _left(name: str, share: diagnosis.Share | None) -> dict[str, Any]:
    value, interval = (None, None) if share is None else (share.value, share.interval)
    return {f"left_{name}": value, f"left_{name}_interval": interval}


def _long(of: Subject) -> Section:
    measured = long.measure(of.model, of.source)
    found, lengths = evidence.sv3_over_lengths(measured.lengths), measured.lengths
    prose = _said("Over {lengths} tokens the sink ratio is {sink_ratios:.2f}.", found)
    ends = zip(lengths.perplexities, lengths.lengths, strict=True)
    stretches = ", ".join(f"{brief(perplexity)} up to {end:,} tokens" for perplexity, end in ends)
    prose += f" Perplexity, stretch by stretch: {stretches} (the model's limit: {lengths.limit:,})."
    times = {name: measured.times(streamed.loss) for name, streamed in measured.streams.items()}
    times[long.ANEW] = measured.times(measured.afresh)
    costs = {name: {"cost": cost, "interval": _numbers(ends)} for name, (cost, *ends) in times.items()}
    said = _listed(f"Over all of it, with {long.BUDGET} keys", _without(costs, CONTROLS))
    streams = {name: [one["cost"], *(one["interval"] or (None, None))] for name, one in costs.items()}
    facts = {"SV3": _facts(found), "streams": streams}
    return Section("long", f"{prose} {said}".rstrip(), facts, picture=plots.lengths(lengths))


STAGES: Mapping[str, Callable[[Subject], Section]] = {
    "spike": _spike,
    "sink": _sink,
    "quantization": _quantization,
    "cache": _cache,
    "long": _long,
}


def page(name: str, about: Mapping[str, Any], done: Mapping[str, Section], left: list[str]) -> str:
    """The report as one page of HTML that opens without anything else."""
    short = "".join(f"<li>{html.escape(line)}</li>" for line in in_short(done))
    words = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(what)}</dd>" for word, what in WORDS.items())
    about = {key: TEXTS.get(value, value) if key == "text" else value for key, value in about.items()}
    parts = [_part(section) for section in done.values()]
    untested = "".join(f"<li>{html.escape(one)}</li>" for one in left)
    facts = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>" for key, value in about.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}: spike and sink</title><style>{STYLE}</style></head><body><main>
<h1>{html.escape(name)}: spike and sink</h1>
<table class="about">{facts}</table>
<section><h2>In short</h2><ul>{short}</ul></section>
{"".join(parts)}
<section><h2>What the words mean</h2><dl>{words}</dl><p>{EXPLAINED}</p></section>
<section><h2>Not tested</h2><ul>{untested}</ul></section>
</main></body></html>
"""


def in_short(done: Mapping[str, Section]) -> list[str]:
    """What a model's owner should know first: what fails of which cause, and what helps."""
    lines = [section.short for section in done.values() if section.short]
    judged = {}
    for section in done.values():
        judged |= {name: fact for name, fact in section.facts.items() if isinstance(fact, dict) and "verdict" in fact}
    tried, unsure = _tried(judged)
    for kind, (what, help_) in HELPS.items():
        of_it = {name: fact["cost"] for name, fact in tried.items() if kind in fact["verdict"]}
        mine = [f"{_called(name)} ({cost:.2f} times)" for name, cost in of_it.items()]
        if mine:
            lines.append(f"{what}: {'; '.join(mine)}. {help_}".rstrip())
    if tried and not any(diagnosis.surely(fact["verdict"]) for fact in tried.values()):
        lines.append("Of what was tried nothing surely costs more than 2% of perplexity.")
    else:
        lines.append(_listed(REMEDY, {name: fact for name, fact in judged.items() if name in REMEDIES[:2]}))
    return [line for line in (*lines, _listed(NOT_SURE, unsure)) if line]


def _tried(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What may be a failure, for it is no remedy and no control; and of that, what is not surely one."""
    tried = _without(facts, REMEDIES + CONTROLS)
    return tried, {name: fact for name, fact in tried.items() if fact["verdict"] == diagnosis.UNSURE}


def _without(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if name not in names}


def _listed(lead: str, facts: Mapping[str, Any]) -> str:
    """What each costs, with its interval where there is one; nothing where there is none to list."""
    said = []
    for name, fact in facts.items():
        ends = ", {:.2f} to {:.2f}".format(*fact["interval"]) if fact["interval"] else ""
        said.append(f"{_called(name)} ({fact['cost']:.2f} times{ends})")
    return f"{lead}: {'; '.join(said)}." if said else ""


def _numbers(interval: Iterable[float]) -> list[float] | None:
    """An interval's ends; None where they are no numbers."""
    ends = list(interval)
    return ends if all(map(math.isfinite, ends)) else None


def _called(name: str) -> str:
    """A technique, where it does not stand in a table of its kind."""
    if name == cache.WINDOW:
        return f"a KV cache of {name}"
    return f"a KV cache {name}" if name.startswith("with ") else name


STYLE = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }
main { max-width: 62rem; margin: 0 auto; padding: 1rem }
img { width: 100%; min-width: 40rem; height: auto }
dt { font-weight: 600 }
.wide { overflow-x: auto }
.about td { overflow-wrap: anywhere }
@media (max-width: 45rem) {
  .wide::before { content: "scrolls sideways where it is too wide"; position: sticky; left: 0; font-size: .8rem }
}
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
"""


def _part(section: Section) -> str:
    table = ""
    if section.table is not None:
        table = f'<div class="wide">{section.table.reset_index().to_html(index=False, border=0)}</div>'
    picture = ""
    if section.picture is not None:
        data = io.BytesIO()
        section.picture.savefig(data, format="png", dpi=110, bbox_inches="tight")
        encoded = base64.b64encode(data.getvalue()).decode()
        source = f"data:image/png;base64,{encoded}"
        alt = html.escape(f"{TITLES[section.key]}: {section.picture.get_suptitle()}".removesuffix(": "))
        picture = f'<div class="wide"><img alt="{alt}" src="{source}"></div>'
    title = html.escape(TITLES[section.key])
    return f"<section><h2>{title}</h2><p>{html.escape(section.prose)}</p>{table}{picture}</section>"
