"""Encoders of the transformers library, built from a plain configuration and never from a repository's code.

A description holds the type of model and its whole configuration, so that a checkpoint is rebuilt without the hub.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everseg.display import counted
from everseg.errors import CheckpointError, ConfigError, near_miss, some
from everseg.files import UnreadableError, json_of, read_regular
from everseg.models.adapters.attention import plain_attention
from everseg.models.adapters.elsewhere import from_elsewhere
from everseg.models.blocks import check_in_channels
from everseg.models.pretrained import WEIGHT_FILES, encoder_state, fetch, spread_channels
from everseg.models.stored import Sizes, TooLargeError, within
from everseg.models.tensor_file import read_tensors

HIDDEN_STATES = ("mobilenet_v2", "mobilevit", "regnet", "segformer")
"""Types without a backbone class whose hidden states are maps."""
NOT_TAKEN = ("timm_backbone",)
"""Backbones that fetch something by themselves."""
DERIVED = {"stage_names", "out_features", "out_indices"}
"""Entries of a configuration that follow from the others and from the taps."""
CODE = ("auto_map", "trust_remote_code")
"""Entries by which a configuration asks for code of the repository."""
MAP_NORMS = "hidden_states_norms."
"""Norms that a backbone adds on its maps: no image classifier has them, so they start fresh, as identity."""
CHANNELS = "num_channels"
"""Entry that says how many channels the images have; a few types have none."""
MAX_TAPS = 4


@dataclass(frozen=True)
class Source:
    """The files of a pretrained encoder's configuration and weights."""

    folder: Path
    weights: Path
    preprocessing: Path | None


def library() -> tuple[Any, Any]:
    """Import transformers and its tables of classes.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        import transformers
        from transformers.models.auto import modeling_auto

        return transformers, modeling_auto
    except Exception as error:  # a torchvision that does not fit torch raises nearly anything
        raise ConfigError(
            "model.encoder: hf: needs the package transformers (pip install 'everseg[hf]'), which cannot be "
            f"imported here: {error}"
        ) from error


def known_types() -> list[str]:
    """The types of model that can be an encoder."""
    return sorted({*library()[1].MODEL_FOR_BACKBONE_MAPPING_NAMES, *HIDDEN_STATES} - {*NOT_TAKEN})


def describe(
    name: str, given: Mapping[str, Any], taps: Any, *, download: bool, channels: int = 3
) -> tuple[dict[str, Any], Source | None]:
    """Turn the name after `hf:` into a description.

    Args:
        name: a type ("segformer": random weights), a folder with config.json and weights, or org/name[@revision].
        given: entries of the configuration that replace those of the type or the file.
        taps: stage names (types with a backbone class) or numbers of hidden states; None = chosen.
        download: allow the network.
        channels: of the images.

    Returns:
        The description, and where the pretrained weights lie (None = random weights).

    Raises:
        ConfigError: unknown name, entry or tap; a type that takes RGB images alone; a repository that needs its own
            code; a download not allowed.
        CheckpointError: a damaged config.json.
    """
    source = None
    if Path(name).expanduser().is_dir():
        source = _in_folder(Path(name).expanduser())
    elif "/" in name:
        source = _in_hub(name, download)
    if source is None:
        kind, stored = name, {}
    else:
        stored = _read_json(source.folder / "config.json")
        asked = [key for key in CODE if key in stored]
        if asked:
            raise ConfigError(
                f"model.encoder: 'hf:{name}' needs code of its own ({', '.join(asked)}), which everseg never runs"
            )
        kind = str(stored.get("model_type"))
    _check_type(kind, name)
    entries = _entries(kind)
    config = {key: value for key, value in stored.items() if key in entries}
    if given.get(CHANNELS, channels) != channels:
        raise ConfigError(
            f"model.options: config: {CHANNELS} is {given[CHANNELS]}, and the images have {channels}; leave it out"
        )
    if CHANNELS in entries:
        config[CHANNELS] = channels
    elif channels != 3:
        raise ConfigError(
            f"model.encoder: encoders of type '{kind}' see three channels, and the images have {channels}; most other "
            "types take any number, such as hf:segformer"
        )
    full = _full_config(kind, {**config, **given})
    if source is not None:
        _check_size(kind, full, source)
    chosen = _chosen(kind, full) if taps is None else taps
    return {"library": "hf", "type": kind, "config": full, "taps": chosen}, source


def _check_size(kind: str, config: Mapping[str, Any], source: Source) -> None:
    """See that a configuration from elsewhere describes no more than its weights, before anything is built of it.

    Raises:
        CheckpointError: it does.
    """
    size = source.weights.stat().st_size
    # A number has a byte at least, and a tensor's entry in the file dozens of them.
    sizes = Sizes(size // 64, size)
    try:
        sizes.check(config, "config.json")
        with torch.random.fork_rng(devices=[]), torch.device("meta"), within(sizes):
            build({"type": kind, "config": config, "taps": None})
    except TooLargeError as error:
        raise CheckpointError(f"model.encoder: 'hf:{source.folder}': {error}") from None


def build(description: Mapping[str, Any]) -> nn.Module:
    """Build a described encoder with random weights from PyTorch's global generator; float32.

    Raises:
        ConfigError: unknown type, unknown or wrong entries or taps.
    """
    kind, taps = description["type"], description["taps"]
    _check_type(kind, kind)
    config = _config(kind, description["config"], taps)
    auto = library()[0]
    factory = auto.AutoModel if kind in HIDDEN_STATES else auto.AutoBackbone
    with _quiet():
        body = factory.from_config(config, dtype=torch.float32)
    return body.train()


def channels(description: Mapping[str, Any]) -> int:
    """Channels of the images that a described encoder takes."""
    return check_in_channels(description["config"].get(CHANNELS, 3))


def read_maps(body: nn.Module, image: Tensor) -> list[Tensor]:
    """Run the encoder: its feature maps, or all its hidden states, finest first."""
    if hasattr(body, "out_features"):
        return list(body(image).feature_maps)
    return list(body(image, output_hidden_states=True).hidden_states)


def read_attention(body: nn.Module, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """As `read_maps`, and the attention of every block: (B, heads, queries, keys), each row a distribution over keys.

    No attention ([]) from a network without. The rows are made in full, which the library's fast kernels avoid.
    """
    states = {} if hasattr(body, "out_features") else {"output_hidden_states": True}
    try:
        with plain_attention(body):
            found = body(image, output_attentions=True, **states)
    except TypeError:  # a network whose forward does not know the word
        return read_maps(body, image), []
    maps = found.feature_maps if hasattr(body, "out_features") else found.hidden_states
    return list(maps), list(getattr(found, "attentions", None) or ())


def positions(description: Mapping[str, Any], count: int) -> list[int] | None:
    """Return which maps are taps: all of a backbone's; of hidden states those asked for (None = everseg chooses)."""
    taps = description["taps"]
    if description["type"] not in HIDDEN_STATES:
        return list(range(count))
    if taps is not None and not (
        isinstance(taps, list) and taps and all(type(tap) is int and 0 <= tap < count for tap in taps)
    ):
        raise ConfigError(f"model.options: taps needs numbers of hidden states, 0 to {count - 1}, got {taps}")
    return taps


def unit(description: Mapping[str, Any]) -> int:
    """Pixels that the sides of a trial image must be a multiple of."""
    # 32 is a multiple of the usual strides and patch sizes. A patch size that does not divide it is taken itself.
    patch = description["config"].get("patch_size")
    return patch if isinstance(patch, int) and 32 % patch else 32


def load_weights(description: Mapping[str, Any], source: Source) -> tuple[dict[str, Tensor], str]:
    """Read the pretrained weights of a described encoder, whatever head they were trained with.

    Weights for RGB serve images of other channels by the rule of `models.pretrained`.

    Returns:
        The encoder's state, complete, and a sentence about it.

    Raises:
        CheckpointError: damaged; weights that are missing, of another shape, or not finite.
    """
    kind, tables = description["type"], library()[1]
    # As the file has them: RGB as a rule.
    stored = _read_json(source.folder / "config.json").get(CHANNELS, 3)
    given = description["config"]
    config = _config(kind, given | ({CHANNELS: stored} if CHANNELS in given else {}), description["taps"])
    classes = tables.MODEL_MAPPING if kind in HIDDEN_STATES else tables.MODEL_FOR_BACKBONE_MAPPING
    where = f"weights of 'hf:{source.folder}'"
    # The library never sees the folder: it would read the weights with torch.load, and any other file that it knows.
    tensors = encoder_state(read_tensors(source.weights), str(source.weights), classifier=())
    try:
        with _quiet():
            body, told = classes[type(config)].from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{where} cannot be loaded: {_first_line(error)}") from error
    fresh = {name for name in told["missing_keys"] if name.startswith(MAP_NORMS)}
    missing = sorted({*told["missing_keys"]} - fresh)
    if missing or told["mismatched_keys"]:
        names = some(missing or [str(key) for key in told["mismatched_keys"]])
        raise CheckpointError(f"{where} do not fit: missing or of another shape: {names}")
    state = body.state_dict()
    if stored != channels(description):
        state = _spread(state, build(description).state_dict(), stored, where)
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(f"{where} are not finite: {some(broken)}; fetch or save the file again")
    note = f", {len(fresh)} of them fresh norms on the maps" if fresh else ""
    return state, f"encoder: {counted(len(state), 'tensor')} from {source.weights}{note}"


def _spread(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], stored: int, where: str
) -> dict[str, Tensor]:
    """Fit the filters that see the image to another number of channels."""
    found = dict(state)
    for name, value in wanted.items():
        if value.shape != state[name].shape:
            if stored != 3:
                raise CheckpointError(f"{where} are of images of {stored} channels, not {value.shape[1]}")
            found[name] = spread_channels(state[name], value.shape[1])
    return found


def preprocessing(source: Source) -> tuple[list[float], list[float]] | None:
    """Mean and deviation per channel that the encoder was trained with, for values in [0, 1]; None = unknown."""
    if source.preprocessing is None:
        return None
    stored = _read_json(source.preprocessing)
    if not stored.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    elif "image_mean" in stored and "image_std" in stored:
        mean, std = ([float(v) for v in stored[key]] for key in ("image_mean", "image_std"))
    else:
        return None
    # Their processor computes (pixel * rescale_factor - mean) / std from bytes. Here pixels lie in [0, 1], so mean and
    # deviation are divided by 255 * rescale_factor.
    factor = 255 * float(stored.get("rescale_factor", 1 / 255)) if stored.get("do_rescale", True) else 255.0
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or factor <= 0:
        raise CheckpointError(f"{source.preprocessing}: image_mean and image_std need three numbers each")
    return [v / factor for v in mean], [v / factor for v in std]


# ---------------------------------------------------------------- configurations


def _check_type(kind: Any, name: str) -> None:
    types = known_types()
    if kind not in types:
        hint = near_miss(str(kind), types)
        what = "" if kind == name else f" is a '{kind}', which"
        raise ConfigError(
            f"model.encoder: 'hf:{name}'{what} is not a type of encoder that everseg can use{hint}, nor a folder, nor "
            f"org/name; types: {', '.join(types)}"
        )


def _entries(kind: str) -> set[str]:
    """What can be set in the configuration of a type."""
    auto = library()[0]
    default = auto.AutoConfig.for_model(kind).to_dict()
    # Entries that every configuration has, whatever its type, do not describe the network.
    return set(default) - set(auto.PretrainedConfig().to_dict()) - DERIVED


def _full_config(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every entry of a type's configuration, as JSON."""
    stored = _config(kind, given, None).to_dict()
    return json.loads(json.dumps({key: stored[key] for key in sorted(_entries(kind))}))


def _config(kind: str, given: Any, taps: Any) -> Any:
    """Make the library's configuration from entries that describe the network; refuse all others.

    Other entries may name code (`auto_map`), or kernels that the library would fetch (`attn_implementation`).
    """
    if not isinstance(given, Mapping):
        raise ConfigError("model.options: config needs keys and values")
    entries = _entries(kind)
    if fetched := from_elsewhere(given):
        raise ConfigError(
            f"model.options: config: {', '.join(fetched)} would fetch a part or run code from elsewhere; leave it out"
        )
    unknown = [str(key) for key in given if key not in entries]
    if unknown:
        hint = near_miss(unknown[0], entries)
        raise ConfigError(
            f"model.options: config: '{kind}' has no {', '.join(unknown)}{hint}; it has {', '.join(sorted(entries))}"
        )
    stages = {} if taps is None or kind in HIDDEN_STATES else {"out_features": _stage_list(taps)}
    try:
        config = library()[0].AutoConfig.for_model(kind, **given, **stages)
    except Exception as error:  # the library's own checks raise many kinds
        raise ConfigError(
            f"model.options: the configuration of '{kind}' is wrong: {_first_line(error)}"
        ) from error
    return config


def _stage_list(taps: Any) -> list[str]:
    if not isinstance(taps, list) or not taps or not all(isinstance(tap, str) for tap in taps):
        raise ConfigError(f"model.options: taps needs names of stages, such as [stage1, stage4], got {taps}")
    return taps


def _chosen(kind: str, config: Mapping[str, Any]) -> list[str] | None:
    """Choose taps: all stages behind the stem, or four at even depths of a plain transformer's many.

    None for hidden states: they are chosen by resolution, once the maps are known.
    """
    if kind in HIDDEN_STATES:
        return None
    names = [name for name in _config(kind, config, None).stage_names if name != "stem"]
    if len(names) <= MAX_TAPS + 1:
        return names[-MAX_TAPS:]
    return [names[len(names) * (k + 1) // MAX_TAPS - 1] for k in range(MAX_TAPS)]


# ---------------------------------------------------------------- files


def _in_folder(folder: Path) -> Source:
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not found:
        raise ConfigError(
            f"model.encoder: folder '{folder}' needs config.json and one of {', '.join(WEIGHT_FILES)} "
            "(save_pretrained of transformers writes them)"
        )
    said = folder / "preprocessor_config.json"
    return Source(folder, found[0], said if said.is_file() else None)


def _in_hub(spec: str, download: bool) -> Source:
    key = "model.encoder"
    config = fetch(spec, ["config.json"], download=download, key=key)
    weights = fetch(spec, WEIGHT_FILES, download=download, key=key)
    said = fetch(spec, ["preprocessor_config.json"], download=download, key=key, needed=False)
    assert config is not None
    assert weights is not None
    return Source(config.parent, weights, said)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json_of(read_regular(path))
    except UnreadableError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} does not hold keys and values")
    return stored


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's bars and tables; our own messages say what matters of them."""
    logging = library()[0].utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
