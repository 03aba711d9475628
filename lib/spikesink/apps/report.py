"""A report on a model for its owner: where its spike and its sinks are, and what that means for serving it.

`diagnose` measures section by section, and writes what is finished after each: `report.json`, and `report.html`, one
page that opens offline.
"""

import argparse
import base64
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
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from torch import Tensor

from spikesink import plots
from spikesink.apps.notebook import say
from spikesink.chain import collapse, keys, sinks, trace
from spikesink.chain.lifecycle import Lifecycle, find_lifecycle
from spikesink.cli import make_table, open_console
from spikesink.common import NotApplicable, brief, check_writable, write_atomically, writing_to
from spikesink.ledger import evidence
from spikesink.ledger.claims import Evidence
from spikesink.model import proof, texts
from spikesink.model.anatomy import Model
from spikesink.model.load import load
from spikesink.model.names import slug
from spikesink.patching import cuts
from spikesink.patching.means import SpikeMeans, spike_means
from spikesink.serving import cache, cells, context, diagnosis, quantize

HEADS = 8  # that are listed, the strongest first
SCHEMA = 2
TITLES = {
    "spike": "The spike",
    "sink": "The sinks",
    "quantization": "Quantization",
    "cache": "A bounded KV cache",
    "long": "Long contexts",
    "holds": "What holds for this model",
}
TEXTS = {"house": "spikesink's own prose, in English", "pydoc": "Python's documentation of its language"}
SENTENCES = {
    "LC1": "The spike reaches {plateau_value} (channels: {channels}), {share_written:.0%} of it written by "
    "{step_up_blocks}.",
    "LC3": "{share_cancelled:.0%} of it is cancelled by {step_down_blocks}.",
    "LC3, never": "No block takes it back.",
    "LC4": "{n_spike_channels} of {d_model} channels spike, the largest with {top_over_median} times the median entry "
    "of all tokens there.",
    "LC7": "{n_spike_tokens} tokens spike, {spike_token_share:.2%} of all; the first one in {position0_share:.0%} of "
    "the windows. The most frequent: {most_frequent}.",
    "SK1": "In {sink_ratio:.0%} of heads and windows the first token gets more than {epsilon} of the attention, and "
    "{mean_attention:.0%} of all attention on average.",
    "X-SK9": "Other tokens that are secondary sinks: {n_tokens}, in layers {first_layer} to {last_layer}.",
    "SV3": "Over {lengths} tokens the sink ratio is {sink_ratios:.2f}.",
}
# How a diagnosis is summed up, and what helps.
ADVICE = {
    diagnosis.OUTLIERS: (
        "Activation outliers, at least in part",
        "Quantize per-token, or leave the spike's channels unrounded.",
    ),
    diagnosis.ROUTING: (
        "Attention routing, at least in part",
        "Keep the first token's key and value: in the cache, and in full precision (where weights are rounded, as the "
        "unrounded weights made them).",
    ),
    diagnosis.NEITHER_HELPS: ("Neither remedy helps", "Try finer steps, or a larger cache."),
    diagnosis.UNCLEAR: ("Cause unclear", ""),
    diagnosis.NOT_TESTED: ("Cause not tested", ""),
}
REMEDIES = (quantize.APART, *cache.FIRST.values(), cache.CONSTANT)
CONTROLS = (quantize.OTHERS_APART, cache.OTHERS)
WITH_REMEDY, NOT_SIGNIFICANT = "With a remedy", "Not significant on so few windows"
NOT_TESTED = (
    "the speed of anything: rounding and forgetting are simulated here",
    "ranges that are fixed beforehand (static quantization), and training with a remedy",
    "any other text, and anything beyond perplexity and the recall of one sentence",
)


def command(chosen: argparse.Namespace) -> None:
    """Measure the model that `spikesink report` is given, and show each section as it is finished."""
    out, console, sections = chosen.out or Path("reports") / slug(chosen.model), open_console(), {}
    check_writable(out, keep=False)
    with console.status(f"loading {chosen.model}") as status:
        model = load(chosen.model, chosen.device, chosen.dtype)
        tokens = texts.windows(model, chosen.text, chosen.n_prompts, chosen.seq_len, chosen.seed)
        for section in diagnose(model, tokens, chosen.text, out, chosen.long, chosen.seed, status.update):
            sections[section.key] = section
            console.print(f"\n{TITLES[section.key]}", style="bold")
            console.print(section.prose)
            if section.table is not None:
                table = (section.table[list(section.narrow)] if section.narrow else section.table).reset_index()
                console.print(make_table(table.columns, table.itertuples(index=False)))
    console.print("\nIn short", style="bold")
    for line in in_short(sections):
        console.print(line)
    console.print(f"\nWritten to {out / 'report.html'} and report.json")


@dataclass(frozen=True)
class Section:
    """One part of a report: what it says, the numbers behind it, and a table and a picture where there are some."""

    key: str
    prose: str
    facts: Mapping[str, Any]
    table: pd.DataFrame | None = None
    picture: Figure | None = field(default=None, repr=False)
    narrow: tuple[str, ...] = ()  # those of the table's columns that a terminal has room for; by default all
    short: str = ""  # what comes first in the report


@dataclass(frozen=True)
class Subject:
    """A model, and the windows it is measured on."""

    model: Model
    tokens: Int[Tensor, "window position"]
    source: str
    seed: int

    @cached_property
    def life(self) -> Lifecycle:
        """Its spike's life in these windows."""
        return find_lifecycle(trace.trace_windows(self.model, self.tokens, self.seed))

    @cached_property
    def means(self) -> SpikeMeans | NotApplicable:
        """What spike tokens are on average, over windows that are then not judged."""
        (held_out, where), _ = cuts.split_windows(self.life, length=self.short)
        return spike_means(self.model, held_out, self.life, where)

    @property
    def short(self) -> int:
        """The length of windows that are run many times."""
        return max(4, self.tokens.shape[1] // 4)


def diagnose(
    model: Model,
    tokens: Int[Tensor, "window position"],
    source: str,
    out: Path,
    with_long: bool = False,
    seed: int = 0,
    begun: Callable[[str], None] = lambda title: None,
) -> Iterator[Section]:
    """Measure a model, a section at a time; when one is yielded, `out/report.json` and `out/report.html` hold it.

    `source` is the text that `tokens` are cut from. With `with_long` a text as long as the context is run as well,
    which takes minutes. `begun` is told before each section which one it is, and after what time.
    """
    subject, finished, started = Subject(model, tokens, source, seed), {}, time.perf_counter()
    stages = STAGES if with_long else {key: stage for key, stage in STAGES.items() if key != "long"}
    header = {
        "model": model.source.spec,
        "sha256": model.source.sha256,
        "text": source,
        "windows": f"{len(tokens)} of {tokens.shape[1]} tokens",
    }
    hidden = [f"{what} in fewer bits: {why}" for what, why in quantize.not_rounded(model).items()]
    for number, (key, stage) in enumerate(stages.items(), 1):
        minutes, seconds = divmod(round(time.perf_counter() - started), 60)
        begun(f"{number} of {len(stages)}: {TITLES[key]} (begun after {minutes}:{seconds:02})")
        finished[key] = stage(subject)
        header["seconds"] = round(time.perf_counter() - started)
        missing = [f"{TITLES[other]} (not measured)" for other in TITLES if other not in finished]
        _write(out, model.source.slug, header, finished, [*missing, *hidden, *NOT_TESTED])
        yield finished[key]


def _write(
    out: Path, name: str, header: Mapping[str, Any], finished: Mapping[str, Section], not_tested: list[str]
) -> None:
    facts = {key: section.facts for key, section in finished.items()}
    data = {"schema": SCHEMA, **header, "sections": facts, "not_tested": not_tested}
    with writing_to(out):
        write_atomically(out / "report.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        write_atomically(out / "report.html", render_page(name, header, finished, not_tested))


def render_page(
    name: str, header: Mapping[str, Any], finished: Mapping[str, Section], not_tested: Sequence[str]
) -> str:
    """The report as one page of HTML that needs no other file."""
    environment = Environment(loader=PackageLoader("spikesink.apps", "."), autoescape=True)
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("report.html.j2").render(
        name=name,
        header=header,
        summary=in_short(finished),
        sections=finished.values(),
        not_tested=not_tested,
        titles=TITLES,
        texts=TEXTS,
        diagnosis=diagnosis,
        epsilon=trace.EPSILON,
    )


def _data_uri(picture: Figure) -> str:
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=110, bbox_inches="tight")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def in_short(finished: Mapping[str, Section]) -> list[str]:
    """What a model's owner should know first: what fails, why, and what helps."""
    lines = [section.short for section in finished.values() if section.short]
    judged = {
        name: fact
        for section in finished.values()
        for name, fact in section.facts.items()
        if isinstance(fact, dict) and "verdict" in fact
    }
    tried = {name: fact for name, fact in judged.items() if name not in REMEDIES + CONTROLS}
    failures = {name: fact for name, fact in tried.items() if diagnosis.is_failure(fact["verdict"])}
    unsure = {name: fact for name, fact in tried.items() if fact["verdict"] == diagnosis.NOT_SIGNIFICANT}
    for cause, (title, advice) in ADVICE.items():
        if of_cause := {name: fact for name, fact in failures.items() if cause in fact["verdict"]}:
            lines.append(f"{_list_costs(title, of_cause)} {advice}".rstrip())
    if tried and not failures:
        lines.append("Nothing that was tried significantly costs more than 2% of perplexity.")
    else:
        lines.append(_list_costs(WITH_REMEDY, {name: judged[name] for name in REMEDIES[:2] if name in judged}))
    lines.append(_list_costs(NOT_SIGNIFICANT, unsure))
    return [line for line in lines if line]


def _list_costs(title: str, facts: Mapping[str, Any]) -> str:
    """What each costs, with its interval where there is one; nothing where there is none to list."""
    costs = []
    for name, fact in facts.items():
        called = f"KV cache, {name}" if name.startswith("window") else name  # a row in a table of caches
        ends = ", {:.2f} to {:.2f}".format(*fact["interval"]) if fact["interval"] else ""
        costs.append(f"{called} ({fact['cost']:.2f} times{ends})")
    return f"{title}: {'; '.join(costs)}." if costs else ""


def _finite(interval: Iterable[float]) -> list[float] | None:
    ends = list(interval)
    return ends if all(map(math.isfinite, ends)) else None


def _describe(judged: Mapping[str, Evidence | NotApplicable], **more: Any) -> tuple[list[str], dict[str, Any]]:
    """A sentence and the measured values for each claim, or the reason why it does not apply."""
    sentences, facts = [], {}
    for claim, one in judged.items():
        if isinstance(one, NotApplicable):
            sentences.append(f"{one.reason[0].upper()}{one.reason[1:]}.")
            facts[claim] = {"reason": one.reason}
        else:
            never = claim == "LC3" and not one.measured["step_down_blocks"]
            words = SENTENCES["LC3, never" if never else claim]
            sentences.append(say(words, one, **more).data.replace("\n", " "))
            facts[claim] = dict(one.measured)
    return list(dict.fromkeys(sentences)), facts


def _spike(subject: Subject) -> Section:
    life = subject.life
    if life.main is None:
        sentence = f"No spike: {life.reason}."
        return Section("spike", sentence, {"reason": life.reason}, short=sentence)
    tokens = evidence.lc7_few_tokens(life, subject.model.tokenizer.decode)
    judged = {"LC1": evidence.lc1_step_up(life), "LC3": evidence.lc3_step_down(life)}
    judged |= {"LC4": evidence.lc4_few_channels(life), "LC7": tokens}
    frequent = ", ".join(map(repr, tokens.measured["spike_tokens"])) if isinstance(tokens, Evidence) else ""
    sentences, facts = _describe(judged, most_frequent=frequent)
    return Section("spike", " ".join(sentences), facts, picture=plots.magnitudes(life), short=sentences[0])


def _sink(subject: Subject) -> Section:
    model, tokens, life, seed = subject.model, subject.tokens, subject.life, subject.seed
    collapsed = collapse.measure_collapse(model, tokens, life, seed)
    attention = keys.read_attention(model, tokens, life, collapsed, seed=seed)
    judged = {"SK1": evidence.sk1_many_heads(attention.scores), "X-SK9": evidence.x_sk9_secondary(attention.secondary)}
    sentences, facts = _describe(judged)
    mean = attention.scores.at.mean(0).nan_to_num(-1)  # layer, head; layers without attention come last
    order = mean.flatten().argsort(descending=True)[: min(HEADS, int((mean >= 0).sum()))].tolist()
    rows = [(*divmod(i, mean.shape[1]), f"{float(mean.flatten()[i]):.0%}") for i in order]
    table = pd.DataFrame(rows, columns=["layer", "head", "attention to position 0"]).set_index("layer")
    picture = plots.sink_map(attention.scores, sinks.score(model, tokens, length=subject.short))
    return Section("sink", " ".join(sentences), facts, table, picture)


def _quantization(subject: Subject) -> Section:
    model, (held_out, (tokens, where)) = subject.model, cuts.split_windows(subject.life, length=subject.short)
    ranges, versions = quantize.measure_ranges(model, *held_out), cells.make_cells(subject.means, where)
    crossed = cells.cross(model, tokens, versions, quantize.rounding_techniques(model, ranges, where), where)
    crossed = quantize.cross_weights(model, tokens, versions, crossed)
    return _costs_section("quantization", crossed, plots.quantizer_steps(ranges))


def _cache(subject: Subject) -> Section:
    model, length = subject.model, subject.tokens.shape[1]
    _, (tokens, where) = cuts.split_windows(subject.life, length=length)
    budget = max(8, length // 4)
    techniques = cache.eviction_techniques(model, budget, where, cuts.sink_held(subject.means), subject.seed)
    crossed = cells.cross(model, tokens, cells.make_cells(subject.means, where), techniques, where)
    recall = context.measure_recall(model, texts.all_ids(model, subject.source), length, budget, seed=subject.seed)
    section = _costs_section("cache", crossed, plots.recalled(recall))
    if isinstance(recall, NotApplicable):
        return section
    gained = {name: {f"{depth:g}": gain for depth, gain in row.items()} for name, row in recall.gained.items()}
    prose = (
        f"{section.prose} Windows have {length} tokens, a query at most {budget} keys. In the picture a fact is told "
        "at some depth and asked for in the end: how many nats likelier the answer is than where another was told."
    )
    return replace(section, prose=prose, facts={**section.facts, "recall": gained})


def _costs_section(key: str, crossed: cells.Crossed | NotApplicable, picture: Figure | None) -> Section:
    """A section about techniques in cells."""
    if isinstance(crossed, NotApplicable):
        return Section(key, f"Not tried: {crossed.reason}.", {"reason": crossed.reason})
    if not crossed.with_it:
        return Section(key, f"Not tried: {quantize.NOT_SHOWN}.", {"reason": quantize.NOT_SHOWN}, picture=picture)
    diagnoses = diagnosis.diagnose(crossed)
    facts = {}
    for name, one in diagnoses.items():
        facts[name] = {"cost": one.cost, "interval": _finite(one.interval)}
        for remedy, left in (("without_spike", one.without_spike), ("with_sink", one.with_sink)):
            facts[name] |= {f"left_{remedy}": left and left.value, f"left_{remedy}_interval": left and left.interval}
        facts[name]["verdict"] = one.verdict
    prose = f"Unchanged, perplexity is {brief(crossed.perplexity(crossed.plain[cells.UNCHANGED]))}."
    if crossed.reason:
        prose = f"Tried in the unchanged model alone: {crossed.reason}. {prose}"
    narrow = ("perplexity ratio", "diagnosis")
    return Section(key, prose, facts, diagnosis.diagnosis_table(diagnoses), picture, narrow)


def _long(subject: Subject) -> Section:
    run = context.measure_long(subject.model, subject.source)
    sentences, facts = _describe({"SV3": evidence.sv3_over_lengths(run.lengths)})
    ends = zip(run.lengths.perplexities, run.lengths.lengths, strict=True)
    stretches = ", ".join(f"{brief(perplexity)} up to {end:,} tokens" for perplexity, end in ends)
    sentences.append(f"Perplexity, stretch by stretch: {stretches} (the model's limit: {run.lengths.limit:,}).")
    times = {name: run.times(name) for name in run.streams}
    facts["streams"] = {name: [cost, *(_finite(interval) or (None, None))] for name, (cost, *interval) in times.items()}
    costs = {name: {"cost": cost, "interval": _finite(interval)} for name, (cost, *interval) in times.items()}
    costs = {name: cost for name, cost in costs.items() if name not in CONTROLS}
    sentences.append(_list_costs(f"Over all of it, with {context.BUDGET} keys", costs))
    return Section("long", " ".join(filter(None, sentences)), facts, picture=plots.lengths(run.lengths))


def _holds(subject: Subject) -> Section:
    """What the model's self-check says: which of the parts that measures stand on it is made of."""
    anatomy, proved = subject.model.anatomy, proof.proof_of(subject.model)
    facts = {part: proved.reasons.get(part, "holds") for part in proof.PARTS}
    with_attention = anatomy.attention_layers
    sentences = ["A tiny run of the model was compared with what each measure takes it to be made of."]
    if len(with_attention) < anatomy.n_layers:
        layers = ", ".join(map(str, with_attention))
        sentences.append(f"{len(with_attention)} of its {anatomy.n_layers} layers show attention: {layers or 'none'}.")
    if anatomy.norm_placement != "pre":
        sentences.append("A norm follows each block, so what its matrices give is not yet what it writes.")
    rows = [(part, proof.CARRIES[part], fact) for part, fact in facts.items()]
    table = pd.DataFrame(rows, columns=["part", "what stands on it", "in this model"]).set_index("part")
    return Section("holds", " ".join(sentences), facts, table)


STAGES: Mapping[str, Callable[[Subject], Section]] = {
    "spike": _spike,
    "sink": _sink,
    "quantization": _quantization,
    "cache": _cache,
    "long": _long,
    "holds": _holds,
}
