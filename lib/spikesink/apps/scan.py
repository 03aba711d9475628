"""What weights alone say of a model that need not fit into memory: `make scan`.

Two things need no text: which channel each FFN can amplify (the census of `amplifier`), and what a token becomes that
stands first (the static path of `model.paths`). Both go through the model once, a layer at a time, read from its files;
so a scan takes the memory of a layer or two, whatever the model. The few channels of largest gain are then taken apart.
What it will take is said before it starts, and each layer that is done is kept, so that an interrupted scan goes on
where it was.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM

from spikesink.chain import amplifier
from spikesink.chain.lifecycle import STEP
from spikesink.chain.trace import SPIKE_OVER_MEDIAN
from spikesink.common import CommandError, NotApplicable, brief, check_writable, progress, write_atomically
from spikesink.model import paths
from spikesink.model.errors import LoadError, quiet
from spikesink.model.gguf import cache_directory, is_dequantized
from spikesink.model.load import gguf_file, prepare, read_configuration
from spikesink.model.names import DEFAULT_MODEL, ENTRIES, local, slug
from spikesink.model.weights import FFN, Weights, gated_parts, give_back, open_weights, require_static_map

KEY = 16  # hexadecimal digits, of all that a scan depends on


SUSPECTS = 10  # (block, channel) pairs of largest gain that are shown


FLOAT = 4  # bytes


PRODUCTS = 2 * 3  # of d_mlp x d_mlp x d_model, to weigh an FFN


WEIGHED = ("gain", "expert")  # what is known of a layer whose FFNs have a gate


HELD = 1.5  # what the process holds over what is in use: an allocator keeps some between two layers


STREAMS = 6  # of all entries that are held at once: what enters and leaves a layer, and what is counted of it


@dataclass(frozen=True)
class Plan:
    """What a scan will take: counted from the model's configuration, without any weights."""

    model: str
    n_layers: int
    parameters: int
    dtype: str  # of the files, if the configuration says so
    read: int  # bytes at most: once to find out where everything is, once more by layers, and the suspects' FFNs again
    peak: int  # bytes held at once, beside what the libraries and the tokenizer take
    operations: int  # of the matrix products
    first: str  # what comes before it: "dequantize" a GGUF file, "download" a hub's model, or nothing
    disk: int  # bytes of the cache that this takes
    unpacked: int  # bytes of the cache that a mixture of experts takes while it is scanned, unless its files are packed

    def seconds(self, per_second: float) -> float:
        """How long the matrix products take at so many operations a second; reading comes on top."""
        return self.operations / per_second

    def sentences(self, per_second: float | None = None) -> str:
        """It as prose."""
        first = {
            "": "",
            "dequantize": f"First its file is dequantized into {cache_directory()}: {_size(self.disk)} there and in "
            "memory. ",
            "download": f"First {_size(self.disk)} are downloaded, unless they are in the hub's cache already. ",
        }
        said = (
            f"{self.model}: {_count(self.parameters)} parameters in {self.n_layers} layers. {first[self.first]}"
            f"The scan reads up to {_size(self.read)}, holds about {_size(self.peak)} besides libraries and "
            f"tokenizer, and makes {_count(self.operations)} operations"
        )
        if per_second:
            said += f", about {_duration(self.seconds(per_second))} here and the time to read it all"
        if self.unpacked:
            said += f"; its experts take up to {_size(self.unpacked)} of {cache_directory()} in the meantime"
        return said + "."


def plan(spec: str | os.PathLike = DEFAULT_MODEL, entries: int = ENTRIES) -> Plan:
    """Tell what a scan of a model takes; of a hub's model only its configuration is fetched, of a GGUF file its header.

    Args:
        spec: as `load` takes it; of a directory, the config.json suffices.
        entries: of the vocabulary, put at position 0.

    Raises:
        LoadError: as `load` does.
        ValueError: no entries, or more than the vocabulary has.
    """
    config = read_configuration(spec)
    _check_entries(entries, config.vocab_size)
    with quiet(), torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=config.dtype)
    d, dtype = config.hidden_size, hf_model.dtype
    blocks = _layers(hf_model, config.num_hidden_layers)
    sizes, widths = [_numel(block) for block in blocks], [_widths(block) for block in blocks]
    stream = STREAMS * entries * d * FLOAT
    layer = max(
        size * (dtype.itemsize + FLOAT) + _weighing(layer, d, entries)
        for size, layer in zip(sizes, widths, strict=True)
    )
    total, embedding = _numel(hf_model), _numel(hf_model.get_input_embeddings()) * dtype.itemsize
    first = _comes_first(os.fspath(spec))
    experts = [p.numel() for name, p in hf_model.named_parameters() if p.ndim == 3 and "experts" in name]
    apart = SUSPECTS * 2 * d * d * max((m for layer in widths for m in layer), default=0)
    return Plan(
        model=slug(os.fspath(spec)),
        n_layers=len(blocks),
        parameters=total,
        dtype=str(dtype).removeprefix("torch."),
        read=(2 * total + sum(sorted(3 * d * sum(layer) for layer in widths)[-SUSPECTS:])) * dtype.itemsize,
        peak=int(max(HELD * (layer + stream), embedding + stream)),
        operations=2 * entries * sum(sizes) + sum(PRODUCTS * m * m * d for layer in widths for m in layer) + apart,
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
    return max(hidden + 3 * amplifier.KERNEL * FLOAT, form) if widths else hidden


def _layers(hf_model: torch.nn.Module, n: int) -> torch.nn.ModuleList:
    lists = (module for module in hf_model.modules() if isinstance(module, torch.nn.ModuleList))
    return next(found for found in lists if len(found) == n)


def _widths(layer: torch.nn.Module) -> list[int]:
    """How many neurons each gated FFN of a layer has."""
    separate = [len(gate) for _, (gate, *_), _ in gated_parts(layer)]
    return separate or [len(p) // 2 for name, p in layer.named_parameters() if name.endswith("gate_up_proj.weight")]


@dataclass(frozen=True)
class Suspect:
    """A channel of an FFN block whose gain is large."""

    block: int
    expert: str | None  # the one where the gain is largest, as `Weights.experts` names it; None where there is one FFN
    channel: int
    gain: float  # ||U_k||_F
    over_median: float  # of the block
    rank_one: float  # the top eigenvalue's share of ||S_k||_F^2


@dataclass(frozen=True)
class Scan:
    """What a scan found. A spike's channel and blocks are those of tokens that stand first, from weights alone."""

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
    kept: Path | None  # where each layer is

    @property
    def peak(self) -> tuple[int, int]:
        """The point where the spike is largest, and its channel: where the mean is largest in medians of the point."""
        over = self.mean.abs() / self.median[:, None]
        channel = int(over.argmax()) % over.shape[1]
        return int(self.mean[:, channel].abs().argmax()), channel

    def steps(self) -> tuple[list[int], list[int]]:
        """Blocks that write at least a tenth of the spike into its channel, up to the peak; and that take it back."""
        point, channel = self.peak
        writes = self.mean[:, channel].diff() / self.mean[point, channel]
        up = [b + 1 for b in range(point) if writes[b] >= STEP]
        return up, [b + 1 for b in range(point, len(writes)) if writes[b] <= -STEP]

    def sentence(self) -> str:
        """Where the first token spikes, as prose."""
        found = self.summary()
        up, down = (", ".join(map(str, found[key])) or "none" for key in ("step_up_blocks", "step_down_blocks"))
        who = "BOS (which always stands there)" if self.only_bos else f"{self.entries:,} vocabulary entries"
        much = (
            "" if self.only_bos else f" on average; {found['share_of_entries']:.1%} exceed {SPIKE_OVER_MEDIAN:g} times"
        )
        return (
            f"At position 0 the stream of {who} is largest in channel {found['channel']} after block "
            f"{found['point']}: {brief(found['value'])}, {brief(found['over_median'])} times the median of all their "
            f"entries there{much}. "
            f"Blocks that write it: {up}; that take it back: {down}."
        )

    def summary(self) -> dict:
        """It in numbers: where the first token spikes, and the channels of largest gain."""
        point, channel = self.peak
        up, down = self.steps()
        found = {
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
            known = [vars(suspect) for suspect in self.suspects]
            found["suspects"] = [{key: value for key, value in row.items() if value is not None} for row in known]
        return found


def scan(
    spec: str | os.PathLike = DEFAULT_MODEL,
    entries: int = ENTRIES,
    folder: str | os.PathLike | None = None,
    say: Callable[[str], None] = lambda said: None,
) -> Scan:
    """Go through a model's weights once, a layer at a time.

    Args:
        spec: as `load` takes it.
        entries: of the vocabulary, spread evenly over it, that are put at position 0; BOS alone where the tokenizer
            always puts it there.
        folder: where each layer that is done is kept, so that the same call goes on after an interruption, and is
            quick after none; what other scans of this model kept there is removed at the end. None to keep nothing.
        say: is told how many layers are there from an earlier run.

    Raises:
        LoadError: as `load` does.
        ValueError: no entries, or more than the vocabulary has; or attention is no fixed map of a first token.
        FloatingPointError: a weight is not finite.
        OSError: the folder cannot be written, or another scan of this model is at work there.
    """
    ready = prepare(spec)
    weights = open_weights(spec, ready.config.dtype)
    about = weights.anatomy
    _check_entries(entries, about.d_vocab)
    try:
        require_static_map(about)
    except NotApplicable as why:
        raise ValueError(f"{why.reason}; see what it does on text instead, with make figures.") from None
    # Where the tokenizer puts BOS first, nothing else ever stands there.
    spread = torch.arange(entries) * about.d_vocab // entries
    first = torch.tensor([about.bos_token]) if about.prepends_bos else spread
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in ready.source.files]
    versions = [importlib.metadata.version(name) for name in ("spikesink", "torch", "transformers")]
    config = (ready.source.directory / "config.json").read_text(encoding="utf-8")
    key = sha256(json.dumps([files, config, first.tolist(), versions]).encode()).hexdigest()[:KEY]
    place = None if folder is None else Path(folder) / f"{ready.source.slug}-{key}"
    with nullcontext() if place is None else _alone(place):
        rows = _each_layer(weights, first, place, say)
        gated = all("gain" in row for row in rows)
        columns = {name: [row[name] for row in rows] for name in rows[0] if gated or name not in WEIGHED}
        gain, expert = (torch.stack(columns[name]) if gated else None for name in WEIGHED)
        suspects = _suspects(weights, gain, expert) if gated else None
        if place is not None:
            _remove_others(place)
    return Scan(
        model=ready.source.slug,
        entries=len(first),
        only_bos=about.prepends_bos,
        block_norm=about.norm_placement != "pre",
        block_gain=gain,
        expert=expert,
        mean=torch.cat(columns["mean"]),
        median=torch.cat(columns["median"]),
        share=torch.cat(columns["share"]),
        suspects=suspects,
        kept=place,
    )


def _each_layer(
    weights: Weights, first: Int[Tensor, " token"], place: Path | None, say: Callable[[str], None]
) -> list[dict[str, Tensor]]:
    """What there is to know of each layer, from an earlier run or from this one."""
    n = weights.anatomy.n_layers
    done = _layers_done(place, n)
    if done:
        say(f"{done} of {n} layers are kept from an earlier run.")
    rows = [load_file(place / _name(layer)) for layer in range(done)]
    if done == n:
        return rows
    x = _stream(place, done) if done else weights.embed(first)
    for layer in progress(range(done, n), "scanning", "layer", done):
        rows.append(_one_layer(weights, layer, x))
        give_back()
        if place is not None:
            _keep(place, layer, rows[-1], x)
    return rows


def _one_layer(weights: Weights, layer: int, x: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
    """Send the stream through a layer, in place, and weigh its FFN."""
    points = [_at_a_point(x)] if layer == 0 else []
    sums: dict[int, list[Tensor]] = {}
    paths.through_layer(
        weights, layer, x, watch=lambda point, part, stream: sums.setdefault(point, []).append(stream.clone())
    )
    points += [_at_a_point(torch.cat(parts)) for parts in sums.values()]
    found = {name: torch.stack([point[name] for point in points]) for name in ("mean", "median", "share")}
    give_back()
    return found | _weigh([ffn for _, ffn in _ffns(weights, layer)])


def _ffns(weights: Weights, layer: int) -> list[tuple[str | None, FFN]]:
    """The gated FFNs of a layer, with their names where there are several."""
    if weights.anatomy.one_gated_ffn:
        return [(None, weights.ffn(layer))]
    return list(weights.experts(layer).items()) if weights.anatomy.n_experts else []


def _at_a_point(h: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
    median = h.abs().median()
    return {"mean": h.mean(0), "median": median, "share": (h.abs() > SPIKE_OVER_MEDIAN * median).float().mean(0)}


def _weigh(ffns: Sequence[FFN]) -> dict[str, Tensor]:
    """||U_k||_F of every channel, of the expert where it is largest."""
    if not ffns:
        return {}
    gain, expert = torch.stack([amplifier.gains(ffn).float() for ffn in ffns]).max(0)
    return {"gain": gain, "expert": expert}


def _suspects(
    weights: Weights, gain: Float[Tensor, "ffn d_model"], expert: Int[Tensor, "ffn d_model"]
) -> tuple[Suspect, ...]:
    """The channels of largest gain over their block's median, the largest first; their blocks are read once more."""
    over = gain / gain.median(dim=1, keepdim=True).values
    largest = over.flatten().topk(min(SUSPECTS, over.numel())).indices.tolist()
    pairs = [divmod(i, over.shape[1]) for i in largest]
    found = {}
    for layer in progress(sorted({layer for layer, _ in pairs}), "taking suspects apart", "block"):
        ffns = _ffns(weights, layer)
        for channel in (k for of, k in pairs if of == layer):
            name, ffn = ffns[int(expert[layer, channel])]
            size, ratio = float(gain[layer, channel]), float(over[layer, channel])
            found[layer, channel] = Suspect(2 * layer + 2, name, channel, size, ratio, _rank_one(ffn, channel))
        del ffns, ffn
        give_back()
    return tuple(found[pair] for pair in pairs)


def _rank_one(ffn: FFN, channel: int) -> float:
    """The top eigenvalue's share of ||S_k||_F^2; S_k is formed, which takes far less than `amplifier.form_norms`."""
    form = amplifier.form(ffn, channel).double().numpy()
    if not form.any():
        return 0.0
    start = np.random.default_rng(0).standard_normal(len(form))  # so that digits repeat
    [top] = eigsh(form, k=1, which="LM", v0=start, return_eigenvectors=False)
    return float(top**2 / np.square(form).sum())


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other scans of the same model away from what this one keeps."""
    lock = place.parent / f"{place.name[: -KEY - 1]}.lock"
    with _keeping(place):
        lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise BlockingIOError(
            f"another scan of this model is at work in {place.parent}; wait for it, or keep the layers elsewhere."
        ) from None


@contextmanager
def _keeping(place: Path) -> Iterator[None]:
    """Turn what the system says while layers are kept into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise OSError(
            f"the layers cannot be kept in {place} ({cause}); make room there, or keep them elsewhere."
        ) from None


def _remove_others(place: Path) -> None:
    """Remove what scans of the same model kept beside a place: of other entries, files or versions of the libraries."""
    for other in place.parent.iterdir():
        if other.is_dir() and other != place and other.name[:-KEY] == place.name[:-KEY]:
            shutil.rmtree(other, ignore_errors=True)


def _name(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def _layers_done(place: Path | None, n_layers: int) -> int:
    """How many layers are kept, from the first on, with the stream that leaves the last of them."""
    if place is None:
        return 0
    kept = next((layer for layer in range(n_layers) if not _is_whole(place / _name(layer))), n_layers)
    # An interruption between the two files of a layer leaves the stream of that layer or of the one before it.
    return next((n for n in (kept, kept - 1) if n > 0 and _is_whole(place / f"stream-{n:03d}.safetensors")), 0)


def _is_whole(file: Path) -> bool:
    """Whether a file that was kept is there and can be read."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _stream(place: Path, done: int) -> Float[Tensor, "token d_model"]:
    return load_file(place / f"stream-{done:03d}.safetensors")["stream"]


def _keep(place: Path, layer: int, row: dict[str, Tensor], x: Tensor) -> None:
    """Keep a layer: its numbers first, then the stream that leaves it, then let go of the one before; each whole."""
    with _keeping(place):
        place.mkdir(parents=True, exist_ok=True)
        for name, values in ((_name(layer), row), (f"stream-{layer + 1:03d}.safetensors", {"stream": x})):
            partial = place / f".{name}"
            save_file({key: value.contiguous() for key, value in values.items()}, partial)
            os.replace(partial, place / name)
        (place / f"stream-{layer:03d}.safetensors").unlink(missing_ok=True)


def table(found: Scan) -> Table:
    """The channels of largest gain, as a table."""
    experts = any(suspect.expert is not None for suspect in found.suspects)
    numbers = ("||U_k||_F", "÷ block's median", "first eigenvalue's share")
    shown = Table("block", *["expert"] * experts, "channel", *numbers)
    for one in found.suspects:
        which = [one.expert] if experts else []
        numbers = (brief(one.gain), brief(one.over_median), f"{one.rank_one:.0%}")
        shown.add_row(str(one.block), *which, str(one.channel), *numbers)
    return shown


def matmul_peak(size: int = 2048, repeats: int = 6) -> float:
    """Operations a second of the fastest of several float32 products of square matrices."""
    a, b = torch.randn(2, size, size)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).median for _ in range(repeats))


def _size(n_bytes: float) -> str:
    return f"{brief(n_bytes / 1e9)} GB" if n_bytes >= 1e9 else f"{brief(n_bytes / 1e6)} MB"


def _count(n: float) -> str:
    size, word = next((pair for pair in ((1e12, "trillion"), (1e9, "billion")) if n >= pair[0]), (1e6, "million"))
    return f"{brief(n / size)} {word}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def command(chosen: argparse.Namespace, console: Console) -> int:
    """Plan and scan what the arguments of `spikesink scan` ask for; returns 0, or 1 for an error."""
    failed = False
    for model in chosen.models:
        try:
            _scan_one(model, chosen, console)
        except (LoadError, ValueError, FloatingPointError, CommandError, OSError) as error:
            console.print(str(error), style="bold red")
            failed = True
    return int(failed)


def _scan_one(model: str, chosen: argparse.Namespace, console: Console) -> None:
    """Plan a model's scan and, unless only that was asked for, do it; raises what both raise, and CommandError."""
    with console.status(f"planning {slug(model)}"):
        planned = plan(model, chosen.entries)
    figures, kept = chosen.figures / planned.model, chosen.build / "scan"
    for folder in () if chosen.plan else (figures, kept):
        check_writable(folder)
    console.print(planned.sentences(matmul_peak()))
    if chosen.plan:
        return
    found = scan(model, chosen.entries, kept, console.print)
    write_atomically(figures / "scan.json", json.dumps(found.summary(), indent=2) + "\n")
    console.print(found.sentence())
    if found.suspects is not None:
        console.print(table(found))
    if found.suspects is not None and found.block_norm:
        console.print("A norm follows each block of this model, so a channel of large gain need not get a large write.")
    console.print(f"Written to {figures / 'scan.json'}; the layers are kept in {found.kept}, for the same scan again")
