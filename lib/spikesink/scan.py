"""What weights alone say of a model that need not fit into memory: `make scan`.

Two things need no text: which channel each FFN can amplify (the census of `amplifier`), and what a token becomes that
stands first (the static path of `firsttoken`). Both go through the model once, a layer at a time, read from its files;
so a scan takes the memory of a layer or two, whatever the model. What it will take is said before it starts, and
each layer that is done is kept, so that an interrupted scan goes on where it was.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spikesink import amplifier, firsttoken
from spikesink.bench import matmul_peak
from spikesink.claims import brief, write_atomically
from spikesink.lifecycle import STEP
from spikesink.models import LoadError, configuration, prepare, quiet
from spikesink.progress import progress
from spikesink.specs import DEFAULT_MODEL, slug
from spikesink.trace import SPIKE_OVER_MEDIAN
from spikesink.weights import FFN, Weights, gated_parts, give_back, no_form, open_weights

ENTRIES = 1024  # of the vocabulary, spread evenly over it, that are put at position 0
SUSPECTS = 10  # (block, channel) pairs of largest gain that are shown
FLOAT = 4  # bytes
# Of d_mlp x d_mlp x d_model, to weigh an FFN: three in float32, and four in float64, which take twice the time.
PRODUCTS = 2 * (3 + 2 * 4)
WEIGHED = ("gain", "expert", "rank_one")  # what is known of a layer whose FFNs have a gate
HELD = 1.5  # what the process holds over what is in use: an allocator keeps some between two layers
STREAMS = 6  # of all entries that are held at once: what enters and leaves a layer, and what is counted of it


@dataclass(frozen=True)
class Plan:
    """What a scan will take: counted from the model's configuration, without any weights."""

    model: str
    n_layers: int
    parameters: int
    dtype: str  # of the files, if the configuration says so
    read: int  # bytes, once to find out where everything is and once more, layer by layer
    peak: int  # bytes held at once, beside what the libraries and the tokenizer take
    operations: int  # of the matrix products; one in float64 counts twice

    def seconds(self, per_second: float) -> float:
        """How long the matrix products take at so many operations a second; reading comes on top."""
        return self.operations / per_second

    def sentences(self, per_second: float | None = None) -> str:
        """It as prose."""
        said = (
            f"{self.model}: {self.parameters / 1e9:.3g} billion parameters in {self.n_layers} layers. "
            f"The scan reads {_size(self.read)} in two rounds, holds about {_size(self.peak)} besides libraries and "
            f"tokenizer, and makes {self.operations / 1e12:.3g} trillion operations"
        )
        if per_second:
            said += f", about {_duration(self.seconds(per_second))} here and the time to read it all"
        return said + "."


def plan(spec: str | os.PathLike = DEFAULT_MODEL, entries: int = ENTRIES) -> Plan:
    """Tell what a scan of a model takes; of a hub's model, only its configuration is fetched.

    Args:
        spec: as `load` takes it; of a directory, the config.json suffices.
        entries: of the vocabulary, put at position 0.

    Raises:
        LoadError: as `load` does.
    """
    config = configuration(spec)
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
    total = _numel(hf_model)
    return Plan(
        model=slug(os.fspath(spec)),
        n_layers=len(blocks),
        parameters=total,
        dtype=str(dtype).removeprefix("torch."),
        read=2 * total * dtype.itemsize,
        peak=int(HELD * (layer + stream)),
        operations=2 * entries * sum(sizes) + sum(PRODUCTS * m * m * d for layer in widths for m in layer),
    )


def _numel(module: torch.nn.Module) -> int:
    return sum({id(p): p.numel() for p in module.parameters()}.values())


def _weighing(widths: Sequence[int], d_model: int, entries: int) -> int:
    """Bytes held besides a layer in float32: one of its FFNs in float64, three kernels, the hidden neurons."""
    widest = max(widths, default=4 * d_model)
    hidden = 2 * min(entries, firsttoken.BATCH) * widest * FLOAT
    return hidden + (3 * widest * d_model + 3 * amplifier.KERNEL) * 2 * FLOAT if widths else hidden


def _layers(hf_model: torch.nn.Module, n: int) -> torch.nn.ModuleList:
    lists = (module for module in hf_model.modules() if isinstance(module, torch.nn.ModuleList))
    return next(found for found in lists if len(found) == n)


def _widths(layer: torch.nn.Module) -> list[int]:
    """How many neurons each gated FFN of a layer has."""
    separate = [len(gate) for _, (gate, *_), _ in gated_parts(layer)]
    return separate or [len(p) // 2 for name, p in layer.named_parameters() if name.endswith("gate_up_proj.weight")]


@dataclass(frozen=True)
class Scan:
    """What a scan found. A spike's channel and blocks are those of tokens that stand first, from weights alone."""

    model: str
    entries: int  # that were put at position 0
    only_bos: bool  # whether that was BOS alone, which the tokenizer always puts there
    block_gain: Float[Tensor, "ffn d_model"] | None  # ||U_k||_F, of the expert where it is largest; None without a gate
    expert: Int[Tensor, "ffn d_model"] | None  # which expert that is; 0 where there is one FFN
    mean: Float[Tensor, "point d_model"]  # the stream at position 0, mean over entries
    median: Float[Tensor, " point"]  # of |h| there, over entries and channels
    share: Float[Tensor, "point d_model"]  # of entries above SPIKE_OVER_MEDIAN medians
    rank_one: Float[Tensor, " ffn"] | None  # share of the top eigenvalue of the channel of largest gain

    @property
    def peak(self) -> tuple[int, int]:
        """The point and channel where the mean is largest, in medians of the point."""
        over = self.mean.abs() / self.median[:, None]
        return tuple(int(i) for i in torch.unravel_index(over.argmax(), over.shape))

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
            ""
            if self.only_bos
            else f" on average; {found['share_of_entries']:.1%} exceed {SPIKE_OVER_MEDIAN:g} medians there"
        )
        return (
            f"At position 0 the stream of {who} is largest in channel {found['channel']} after block "
            f"{found['point']}: {brief(found['value'])}, {brief(found['over_median'])} medians{much}. "
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
        if self.block_gain is not None:
            found["suspects"] = [
                dict(zip(("block", "expert", "channel", "gain", "over_median", "rank_one"), row, strict=True))
                for row in self.suspects()
            ]
        return found

    def suspects(self, n: int = SUSPECTS) -> list[tuple[int, int, int, float, float, float | None]]:
        """The (block, channel) pairs of largest gain over their block's median, the largest first.

        Block, expert (0 where there is one FFN), channel, gain, gain over the block's median, and, for a block's first
        channel, what share the top eigenvalue has of ||S_k||_F^2.
        """
        over = self.block_gain / self.block_gain.median(dim=1, keepdim=True).values
        rows = []
        for i in over.flatten().topk(min(n, over.numel())).indices.tolist():
            ffn, k = divmod(i, over.shape[1])
            gains = self.block_gain[ffn]
            share = float(self.rank_one[ffn]) if k == int(gains.argmax()) else None
            rows.append((2 * ffn + 2, int(self.expert[ffn, k]), k, float(gains[k]), float(over[ffn, k]), share))
        return rows


def scan(
    spec: str | os.PathLike = DEFAULT_MODEL, entries: int = ENTRIES, folder: str | os.PathLike | None = None
) -> Scan:
    """Go through a model's weights once, a layer at a time.

    Args:
        spec: as `load` takes it.
        entries: of the vocabulary, spread evenly over it, that are put at position 0; BOS alone where the tokenizer
            always puts it there.
        folder: where each layer that is done is kept, so that the same call goes on after an interruption; None to
            keep nothing.

    Raises:
        LoadError: as `load` does.
        ValueError: no entries, or more than the vocabulary has.
    """
    ready = prepare(spec)
    weights = open_weights(spec, ready.config.dtype)
    about = weights.anatomy
    if not 0 < entries <= about.d_vocab:
        raise ValueError(f"{entries} entries were asked for, and this model's vocabulary has {about.d_vocab}.")
    # Where the tokenizer puts BOS first, nothing else ever stands there.
    spread = torch.arange(entries) * about.d_vocab // entries
    first = torch.tensor([about.bos_token]) if about.prepends_bos else spread
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in ready.source.files]
    versions = [importlib.metadata.version(name) for name in ("spikesink", "torch", "transformers")]
    key = sha256(json.dumps([files, first.tolist(), versions]).encode()).hexdigest()[:16]
    place = None if folder is None else Path(folder) / f"scan-{key}"
    done = _layers_done(place, about.n_layers)
    x = _stream(place, done) if done else weights.embed(first)
    rows = [load_file(place / _name(layer)) for layer in range(done)]
    for layer in progress(range(done, about.n_layers), f"scanning from layer {done}", "layer"):
        rows.append(_one_layer(weights, layer, x))
        give_back()
        if place is not None:
            _keep(place, layer, rows[-1], x)
    gated = all("gain" in row for row in rows)
    columns = {name: [row[name] for row in rows] for name in rows[0] if gated or name not in WEIGHED}
    return Scan(
        model=ready.source.slug,
        entries=len(first),
        only_bos=about.prepends_bos,
        block_gain=torch.stack(columns["gain"]) if gated else None,
        expert=torch.stack(columns["expert"]) if gated else None,
        mean=torch.cat(columns["mean"]),
        median=torch.cat(columns["median"]),
        share=torch.cat(columns["share"]),
        rank_one=torch.stack(columns["rank_one"]) if gated else None,
    )


def _one_layer(weights: Weights, layer: int, x: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
    """Send the stream through a layer, in place, and weigh its FFN."""
    points = [_at_a_point(x)] if layer == 0 else []
    sums: dict[int, list[Tensor]] = {}
    firsttoken.through_layer(
        weights, layer, x, watch=lambda point, part, stream: sums.setdefault(point, []).append(stream.clone())
    )
    points += [_at_a_point(torch.cat(parts)) for parts in sums.values()]
    found = {name: torch.stack([point[name] for point in points]) for name in ("mean", "median", "share")}
    give_back()
    return found | _weigh(_ffns(weights, layer))


def _ffns(weights: Weights, layer: int) -> list[FFN]:
    if no_form(weights.anatomy) is None:
        return [weights.ffn(layer)]
    return list(weights.experts(layer).values()) if weights.anatomy.n_experts else []


def _at_a_point(h: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
    median = h.abs().median()
    return {"mean": h.mean(0), "median": median, "share": (h.abs() > SPIKE_OVER_MEDIAN * median).float().mean(0)}


def _weigh(ffns: Sequence[FFN]) -> dict[str, Tensor]:
    """||U_k||_F of every channel, of the expert where it is largest, and how nearly the largest one is of rank one."""
    if not ffns:
        return {}
    gain, expert = torch.stack([amplifier.gains(ffn).float() for ffn in ffns]).max(0)
    k = int(gain.argmax())
    give_back()
    return {
        "gain": gain,
        "expert": expert,
        "rank_one": amplifier.directions(ffns[int(expert[k])], [k]).shares[0].float(),
    }


def _name(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def _layers_done(place: Path | None, n_layers: int) -> int:
    """How many layers are kept, from the first on, with the stream that leaves the last of them."""
    if place is None:
        return 0
    kept = next((layer for layer in range(n_layers) if not (place / _name(layer)).is_file()), n_layers)
    # An interruption between the two files of a layer leaves the stream of that layer or of the one before it.
    return next((n for n in (kept, kept - 1) if n > 0 and (place / f"stream-{n:03d}.safetensors").is_file()), 0)


def _stream(place: Path, done: int) -> Float[Tensor, "token d_model"]:
    return load_file(place / f"stream-{done:03d}.safetensors")["stream"]


def _keep(place: Path, layer: int, row: dict[str, Tensor], x: Tensor) -> None:
    """Keep a layer: its numbers first, then the stream that leaves it, then let go of the one before; each whole."""
    place.mkdir(parents=True, exist_ok=True)
    for name, values in ((_name(layer), row), (f"stream-{layer + 1:03d}.safetensors", {"stream": x})):
        partial = place / f".{name}"
        save_file({key: value.contiguous() for key, value in values.items()}, partial)
        os.replace(partial, place / name)
    (place / f"stream-{layer:03d}.safetensors").unlink(missing_ok=True)


def table(found: Scan) -> Table:
    """The channels of largest gain, as a table."""
    shown = Table("block", "expert", "channel", "||U_k||_F", "over its block's median", "first eigenvalue's share")
    for *where, gain, over, share in found.suspects():
        shown.add_row(*map(str, where), brief(gain), brief(over), "" if share is None else f"{share:.0%}")
    return shown


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan and scan what `arguments` (by default the command line's) ask for; 0, 1 for an error, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m spikesink.scan", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="built-in name, .gguf file, directory or hub id")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="of the vocabulary, at position 0")
    parser.add_argument("--plan", action="store_true", help="only say what it takes")
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    parser.add_argument("--build", type=Path, default=Path("build"))
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        planned = plan(chosen.model, chosen.entries)
        console.print(planned.sentences(matmul_peak()))
        if chosen.plan:
            return 0
        found = scan(chosen.model, chosen.entries, chosen.build / "scan" / planned.model)
    except (LoadError, ValueError) as error:
        console.print(str(error), style="bold red")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the layers that are done are kept, run the same command to go on")
        return 130
    folder = chosen.figures / found.model
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "scan.json", json.dumps(found.summary(), indent=2) + "\n")
    console.print(found.sentence())
    if found.block_gain is not None:
        console.print(table(found))
    console.print(f"Written to {folder / 'scan.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
