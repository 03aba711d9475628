"""What weights alone say of a model that need not fit into memory: `make scan`.

Two things need no text: which channel each FFN can amplify (the census of `amplifier`), and what a token becomes that
stands first (the static path of `model.paths`). Both go through the model once, a layer at a time, read from its files;
so a scan takes the memory of a layer or two, whatever the model. The few channels of largest gain are then taken apart.
What it will take is said before it starts, and what is known after a layer is kept until the scan is done.
"""

import argparse
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

from spikesink.chain import amplifier
from spikesink.chain.lifecycle import STEP
from spikesink.chain.trace import SPIKE_OVER_MEDIAN
from spikesink.cli import make_table, open_console
from spikesink.common import NotApplicable, brief, check_writable, in_a_sentence, progress, write_atomically
from spikesink.model import paths
from spikesink.model.anatomy import Block, mlp
from spikesink.model.errors import quiet
from spikesink.model.gguf import is_dequantized
from spikesink.model.load import Prepared, gguf_file, prepare, read_configuration
from spikesink.model.names import DEFAULT_MODEL, ENTRIES, cache_directory, local, slug
from spikesink.model.proof import STATIC_PATH, require
from spikesink.model.weights import FFN, Weights, gated_parts, give_back, open_weights

SUSPECTS = 10  # (block, channel) pairs of largest gain that are shown
FLOAT = 4  # bytes
HELD = 1.5  # what the process holds over what is in use: an allocator keeps some between two layers
STREAMS = 6  # of all entries that are held at once: what enters and leaves a layer, and what is counted of it


@dataclass(frozen=True)
class Plan:
    """What a scan will take: counted from the model's configuration, without any weights."""

    model: str
    n_layers: int
    parameters: int
    read: int  # bytes at most: once to find out where everything is, once more by layers, and the suspects' FFNs again
    peak: int  # bytes held at once, beside what the libraries and the tokenizer take
    operations: int  # of the matrix products
    first: str  # what comes before it: "dequantize" a GGUF file, "download" a hub's model, or nothing
    disk: int  # bytes of the cache that this takes
    unpacked: int  # bytes of the cache that a mixture of experts takes while it is scanned, unless its files are packed

    def sentences(self, per_second: float | None = None) -> str:
        """It as prose."""
        size, cache = _size(self.disk), cache_directory()
        first = {
            "": "",
            "dequantize": f"First its file is dequantized into {cache}: {size} there and in memory. ",
            "download": f"First {size} are downloaded, unless they are in the hub's cache already. ",
        }
        said = (
            f"{self.model}: {_count(self.parameters)} parameters in {self.n_layers} layers. {first[self.first]}"
            f"The scan reads up to {_size(self.read)}, holds about {_size(self.peak)} besides libraries and "
            f"tokenizer, and makes {_count(self.operations)} operations"
        )
        if per_second:
            said += f", about {_duration(self.operations / per_second)} here and the time to read it all"
        if self.unpacked:
            said += f"; its experts take up to {_size(self.unpacked)} of {cache} in the meantime"
        return said + "."


def plan(spec: str | os.PathLike = DEFAULT_MODEL, entries: int = ENTRIES) -> Plan:
    """Tell what a scan of a model takes, from its configuration alone, or from the header of its GGUF file."""
    config = read_configuration(spec)
    _check_entries(entries, config.vocab_size)
    with quiet(), torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=config.dtype)
    d, dtype = config.hidden_size, hf_model.dtype
    lists = (module for module in hf_model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks = next(layers for layers in lists if len(layers) == config.num_hidden_layers)
    sizes, widths = [_numel(block) for block in blocks], [_widths(block) for block in blocks]
    stream = STREAMS * entries * d * FLOAT
    layer = max(
        size * (dtype.itemsize + FLOAT) + _weighing(layer, d, entries)
        for size, layer in zip(sizes, widths, strict=True)
    )
    total, embedding = _numel(hf_model), _numel(hf_model.get_input_embeddings()) * dtype.itemsize
    first = _comes_first(os.fspath(spec))
    experts = [p.numel() for name, p in hf_model.named_parameters() if p.ndim == 3 and "experts" in name]
    weighed = sum(amplifier.operations(m, d) for layer in widths for m in layer)
    apart = SUSPECTS * 2 * d * d * max((m for layer in widths for m in layer), default=0)
    return Plan(
        model=slug(os.fspath(spec)),
        n_layers=len(blocks),
        parameters=total,
        read=(2 * total + sum(sorted(3 * d * sum(layer) for layer in widths)[-SUSPECTS:])) * dtype.itemsize,
        peak=int(max(HELD * (layer + stream), embedding + stream)),
        operations=2 * entries * sum(sizes) + weighed + apart,
        first=first,
        disk=total * dtype.itemsize if first else 0,
        unpacked=sum(experts) * dtype.itemsize,
    )


def _check_entries(entries: int, d_vocab: int) -> None:
    if not 0 < entries <= d_vocab:
        raise ValueError(
            f"{entries} entries were asked for, and this model's vocabulary has {d_vocab}; ask for 1 to {d_vocab}."
        )


def _comes_first(spec: str) -> str:
    """What a scan does before it starts; of a hub's model it is not known here what the hub's cache has."""
    file = gguf_file(spec)
    if file is not None:
        return "" if is_dequantized(file) else "dequantize"
    return "download" if local(spec) is None else ""


def _numel(module: torch.nn.Module) -> int:
    return sum({id(p): p.numel() for p in module.parameters()}.values())


def _weighing(widths: Sequence[int], d_model: int, entries: int) -> int:
    """Bytes held besides a layer in float32: hidden neurons and three kernels, or what it takes to form an S_k."""
    widest = max(widths, default=4 * d_model)
    hidden = 2 * min(entries, paths.BATCH) * widest * FLOAT
    form = (widest + 6 * d_model) * d_model * FLOAT
    kernels = 3 * min(amplifier.KERNEL, widest**2 // 8) * FLOAT
    return max(hidden + kernels, form) if widths else hidden


def _widths(layer: torch.nn.Module) -> list[int]:
    """How many neurons each gated FFN of a layer has."""
    separate = [len(gate) for _, (gate, *_), _ in gated_parts(layer)]
    return separate or [len(p) // 2 for name, p in layer.named_parameters() if name.endswith("gate_up_proj.weight")]


@dataclass(frozen=True)
class Suspect:
    """A channel of an FFN block whose gain is large."""

    block: Block
    expert: str | None  # the one where the gain is largest, as `Weights.experts` names it; None where there is one FFN
    channel: int
    gain: float  # ||U_k||_F
    over_median: float  # of the block
    rank_one: float  # the top eigenvalue's share of ||S_k||_F^2


@dataclass(frozen=True)
class Scan:
    """What a scan measured. A spike's channel and blocks are those of tokens that stand first, from weights alone."""

    model: str
    entries: int  # that were put at position 0
    only_bos: bool  # whether that was BOS alone, which the tokenizer always puts there
    block_norm: bool  # whether a norm follows each block, so that its gain is not what reaches the stream
    block_gain: Float[Tensor, "ffn d_model"] | None  # ||U_k||_F, of the expert where it is largest; None without a gate
    expert: Int[Tensor, "ffn d_model"] | None  # that expert's place in `Weights.experts`; 0 where there is one FFN
    mean: Float[Tensor, "point d_model"]  # the stream at position 0, mean over entries
    median: Float[Tensor, " point"]  # of |h| there, over entries and channels
    share: Float[Tensor, "point d_model"]  # of entries above SPIKE_OVER_MEDIAN medians
    suspects: tuple[Suspect, ...] | None  # SUSPECTS of largest gain over their block's median, the largest first

    @property
    def peak(self) -> tuple[Block, int]:
        """After which block the spike is largest, and its channel: where the mean is most medians of the stream."""
        over = self.mean.abs() / self.median[:, None]
        channel = int(over.argmax()) % over.shape[1]
        return Block(self.mean[:, channel].abs().argmax()), channel

    def steps(self) -> tuple[list[Block], list[Block]]:
        """Blocks that write at least a tenth of the spike into its channel, up to the peak; and that take it back."""
        point, channel = self.peak
        writes = self.mean[:, channel].diff() / self.mean[point, channel]
        up = [Block(b + 1) for b in range(point) if writes[b] >= STEP]
        return up, [Block(b + 1) for b in range(point, len(writes)) if writes[b] <= -STEP]

    def sentence(self) -> str:
        """Where the first token spikes, as prose."""
        summary, (point, _) = self.summary(), self.peak
        up, down = (", ".join(map(str, blocks)) or "none" for blocks in self.steps())
        who = "BOS (which always stands there)" if self.only_bos else f"{self.entries:,} vocabulary entries"
        share = f" on average; {summary['share_of_entries']:.1%} exceed {SPIKE_OVER_MEDIAN:g} times"
        return (
            f"At position 0 the stream of {who} is largest in channel {summary['channel']} after {point}: "
            f"{brief(summary['value'])}, {brief(summary['over_median'])} times the median of all their entries there"
            f"{'' if self.only_bos else share}. Blocks that write it: {up}; that take it back: {down}."
        )

    def summary(self) -> dict:
        """It in numbers: where the first token spikes, and the channels of largest gain."""
        point, channel = self.peak
        up, down = self.steps()
        summary = {
            "model": self.model,
            "entries": self.entries,
            "channel": channel,
            "value": float(self.mean[point, channel]),
            "over_median": float(self.mean[point, channel].abs() / self.median[point]),
            "share_of_entries": float(self.share[point, channel]),
            "point": point,
            "step_up_blocks": up,
            "step_down_blocks": down,
        }
        if self.suspects is not None:
            rows = [asdict(suspect) for suspect in self.suspects]
            summary["suspects"] = [{key: value for key, value in row.items() if value is not None} for row in rows]
        return summary


def scan(
    spec: str | os.PathLike = DEFAULT_MODEL, entries: int = ENTRIES, folder: str | os.PathLike | None = None
) -> Scan:
    """Go through a model's weights once, a layer at a time.

    `entries` of the vocabulary, spread evenly, are put at position 0; BOS alone where the tokenizer always puts it
    there. What is known after each layer is kept in `folder`, so that the same call goes on after an interruption.

    Raises:
        ValueError: no entries, or more than the vocabulary has; or attention is no fixed map of a first token.
    """
    ready = prepare(spec)
    weights = open_weights(spec, ready.config.dtype)
    anatomy = weights.anatomy
    _check_entries(entries, anatomy.d_vocab)
    try:
        require(weights, *STATIC_PATH)
    except NotApplicable as why:
        raise ValueError(f"{why.reason}; see what it does on text instead, with make figures.") from None
    # Where the tokenizer puts BOS first, nothing else ever stands there.
    spread = torch.arange(entries) * anatomy.d_vocab // entries
    first = torch.tensor([anatomy.bos_token]) if anatomy.prepends_bos else spread
    rows = _scan_layers(weights, first, None if folder is None else Path(folder) / _name(ready, first))
    gated = all("gain" in row for row in rows)
    gain, expert = (torch.stack([row[name] for row in rows]) if gated else None for name in ("gain", "expert"))
    return Scan(
        model=ready.source.slug,
        entries=len(first),
        only_bos=anatomy.prepends_bos,
        block_norm=anatomy.norm_placement != "pre",
        block_gain=gain,
        expert=expert,
        suspects=_take_apart(weights, gain, expert) if gated else None,
        **{name: torch.cat([row[name] for row in rows]) for name in ("mean", "median", "share")},
    )


def _name(ready: Prepared, first: Int[Tensor, " token"]) -> str:
    """The name of what is kept of a scan: of the same files, entries and libraries."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in ready.source.files]
    config = (ready.source.directory / "config.json").read_text(encoding="utf-8")
    versions = [importlib.metadata.version(name) for name in ("spikesink", "torch", "transformers")]
    key = sha256(json.dumps([files, config, first.tolist(), versions]).encode()).hexdigest()
    return f"{ready.source.slug}-{key[:16]}.pt"


def _scan_layers(weights: Weights, first: Int[Tensor, " token"], kept: Path | None) -> list[dict[str, Tensor]]:
    """What there is to know of each layer; what an interrupted scan knew is not measured again."""
    rows, x = torch.load(kept) if kept is not None and kept.exists() else ([], weights.embed(first))
    for layer in progress(range(len(rows), weights.anatomy.n_layers), "scanning", "layer", len(rows)):
        rows.append(_scan_layer(weights, layer, x))
        give_back()
        if kept is not None:
            check_writable(kept.parent)
            partial = kept.with_suffix(".partial")
            torch.save((rows, x), partial)
            os.replace(partial, kept)
    if kept is not None:
        kept.unlink()
    return rows


def _scan_layer(weights: Weights, layer: int, x: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
    """Send the stream through a layer, in place, and weigh its FFN."""
    streams: dict[int, list[Tensor]] = {}
    points = [_describe_stream(x)] if layer == 0 else []
    paths.through_layer(
        weights, layer, x, watch=lambda point, part, stream: streams.setdefault(point, []).append(stream.clone())
    )
    points += [_describe_stream(torch.cat(parts)) for parts in streams.values()]
    row = {name: torch.stack([point[name] for point in points]) for name in points[0]}
    give_back()
    ffns = _ffns(weights, layer)
    if ffns:
        gain, expert = torch.stack([amplifier.gains(ffn).float() for _, ffn in ffns]).max(0)
        row |= {"gain": gain, "expert": expert}
    return row


def _ffns(weights: Weights, layer: int) -> list[tuple[str | None, FFN]]:
    """The gated FFNs of a layer, with their names where there are several."""
    if weights.anatomy.one_gated_ffn:
        return [(None, weights.ffn(layer))]
    return list(weights.experts(layer).items()) if weights.anatomy.n_experts else []


def _describe_stream(h: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
    median = h.abs().median()
    return {"mean": h.mean(0), "median": median, "share": (h.abs() > SPIKE_OVER_MEDIAN * median).float().mean(0)}


def _take_apart(
    weights: Weights, gain: Float[Tensor, "ffn d_model"], expert: Int[Tensor, "ffn d_model"]
) -> tuple[Suspect, ...]:
    """The channels of largest gain over their block's median, the largest first; their blocks are read once more."""
    over = gain / gain.median(dim=1, keepdim=True).values
    largest = over.flatten().topk(min(SUSPECTS, over.numel())).indices.tolist()
    pairs = [divmod(i, over.shape[1]) for i in largest]
    suspects = {}
    for layer in progress(sorted({layer for layer, _ in pairs}), "taking suspects apart", "block"):
        ffns = _ffns(weights, layer)
        for channel in (k for in_layer, k in pairs if in_layer == layer):
            name, ffn = ffns[int(expert[layer, channel])]
            size, ratio = float(gain[layer, channel]), float(over[layer, channel])
            suspects[layer, channel] = Suspect(mlp(layer), name, channel, size, ratio, _rank_one(ffn, channel))
        del ffns, ffn
        give_back()
    return tuple(suspects[pair] for pair in pairs)


def _rank_one(ffn: FFN, channel: int) -> float:
    """The top eigenvalue's share of ||S_k||_F^2; S_k is formed, which takes far less than `amplifier.form_norms`."""
    form = amplifier.form(ffn, channel).double().numpy()
    if not form.any():
        return 0.0
    start = np.random.default_rng(0).standard_normal(len(form))  # so that digits repeat
    [top] = eigsh(form, k=1, which="LM", v0=start, return_eigenvectors=False)
    return float(top**2 / np.square(form).sum())


def table(scan: Scan) -> Table:
    """The channels of largest gain, as a table."""
    experts = any(suspect.expert is not None for suspect in scan.suspects)
    headings = ("||U_k||_F", "÷ block's median", "first eigenvalue's share")
    shown = Table("block", *["expert"] * experts, "channel", *headings)
    for one in scan.suspects:
        numbers = (brief(one.gain), brief(one.over_median), f"{one.rank_one:.0%}")
        shown.add_row(str(one.block), *[str(one.expert)] * experts, str(one.channel), *numbers)
    return shown


def matmul_peak(size: int = 2048, repeats: int = 6) -> float:
    """Operations a second of the fastest of several float32 products of square matrices."""
    a, b = torch.randn(2, size, size)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).median for _ in range(repeats))


def _size(n_bytes: int) -> str:
    return f"{brief(n_bytes / 1e9)} GB" if n_bytes >= 1e9 else f"{brief(n_bytes / 1e6)} MB"


def _count(n: int) -> str:
    size, word = next((pair for pair in ((1e12, "trillion"), (1e9, "billion")) if n >= pair[0]), (1e6, "million"))
    return f"{brief(n / size)} {word}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_census(chosen: argparse.Namespace) -> None:
    """Show the (block, channel) pairs of largest gain, as `spikesink census` does."""
    weights, console = open_weights(chosen.model), open_console()
    census = amplifier.census(weights)
    if isinstance(census, NotApplicable):
        raise ValueError(f"{census.reason}.")
    rows = [
        (block, channel, brief(gain), brief(census.over_median(block, channel)))
        for block, channel, gain in census.top(chosen.top)
    ]
    console.print(make_table(["block", "channel", "||U_k||_F", "over its block's median"], rows))
    if weights.anatomy.norm_placement != "pre":
        console.print(
            "In this model what an FFN gives passes another norm before it is added. Its scale is not in these gains, "
            "so the spike's channel can be another one: probe names it."
        )


def show_probe(chosen: argparse.Namespace) -> None:
    """Say where the first token spikes, as `spikesink probe` does."""
    open_console().print(scan(chosen.model, chosen.entries).sentence())


def command(chosen: argparse.Namespace) -> int:
    """Plan and scan what the arguments of `spikesink scan` ask for; returns 0, or 1 where a model failed."""
    failed, console = False, open_console()
    for model in chosen.models:
        try:
            _scan_one(model, chosen, console)
        except Exception as error:
            which = f"{slug(model)} not done: " if len(chosen.models) > 1 else ""
            console.print(f"{which}{in_a_sentence(error)}", style="bold red")
            failed = True
    return int(failed)


def _scan_one(model: str, chosen: argparse.Namespace, console: Console) -> None:
    """Plan a model's scan and, unless only that was asked for, do it."""
    with console.status(f"planning {slug(model)}"):
        planned = plan(model, chosen.entries)
    figures, kept = chosen.figures / planned.model, chosen.build / "scan"
    for folder in () if chosen.plan else (figures, kept):
        check_writable(folder)
    console.print(planned.sentences(matmul_peak()))
    if chosen.plan:
        return
    result = scan(model, chosen.entries, kept)
    write_atomically(figures / "scan.json", json.dumps(result.summary(), indent=2) + "\n")
    console.print(result.sentence())
    if result.suspects is not None:
        console.print(table(result))
        if result.block_norm:
            console.print("A norm follows each block of this model, so a channel of large gain may get a small write.")
    console.print(f"Written to {figures / 'scan.json'}")
