"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, as for transformers' GptOssForCausalLM.

What is written here loads in `peft`, and what peft wrote loads here, with the same effect. q, k, v and o are linear
modules to PEFT; the router and the experts are bare parameters (`target_parameters`), wrapped one inside the other
where a module has several, so that an inner one's tensors are called `…experts.base_layer.lora_A.weight`. PEFT lays
the factors of E experts out as two matrices: A (E·R, I), an expert's rows together, and B (O, R·E), a rank's columns
together. Everything that changes what an adapter computes is honoured or refused by name: DoRA, biases, whole trained
modules, embeddings, inits that also changed the base model, and options that this file does not know.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freehold.config import ModelConfig
from freehold.disk import new_file, new_folder, write_text
from freehold.errors import CheckpointError, MisfitError, ModelNotFoundError, UnsupportedError, UsageError
from freehold.model.lora import EXPERT_KINDS, KINDS, Adapter, AdapterSpec, Factors, Target, factor_shapes
from freehold.weights.files import TensorInfo, TensorToWrite, header_bytes, read_header, read_json, write_data

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

_MODULES = {kind: f"self_attn.{kind}_proj" for kind in "qkvo"}
_PARAMETERS = {
    "router": "mlp.router.weight",
    "gate_up": "mlp.experts.gate_up_proj",
    "down": "mlp.experts.down_proj",
}
_PATHS = _MODULES | _PARAMETERS

# Each may stand in a config without changing what the tensors beside it compute.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",  # looked at for itself below
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",  # of training
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # of use_qalora
    "revision",
    "target_modules",  # the names of the tensors say what was targeted
    "task_type",
}
_HONOURED = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "target_parameters", "use_rslora"}
_REFUSED = {
    "bias": "trained biases",
    "fan_in_fan_out": "weights stored the other way round",
    "layer_replication": "layers that are used twice",
    "lora_bias": "biases of its own",
    "modules_to_save": "modules trained as a whole",
    "trainable_token_indices": "trained rows of the embedding",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# In the tensors' file, of which every reader but this one ignores them.
_DITHERED = {"freehold_merge": "dithered"}
_CHAT_FORMAT = "freehold_chat_format"
_CHAT_FORMATS = {True: "harmony", False: "template"}

# A layer's number has one way to be written: two names for one tensor would leave it to the reader which one counts.
_TENSOR_NAME = re.compile(r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,4})\.([a-z_.]+)\.lora_([AB])\.weight")

# Of a foreign file, far more than an adapter of the largest model has: no memory is taken by what is none.
_MOST_CONFIG_BYTES, _MOST_HEADER_BYTES = 1 << 20, 16 << 20
_FACTOR_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of all patterns together, in ways to match one name: PEFT's own have one each, and each `.*` is worth 41. Trying a
# pattern costs something in any case.
_MOST_WAYS, _LEAST_WAYS = 200_000, 100


# --- writing ----------------------------------------------------------------------------------------------------


def write_peft(folder: Path, adapter: Adapter, *, base_model: str | None = None, dropout: float = 0.0) -> None:
    """Write an adapter as a new folder, in the type that it has. `base_model` is the name that PEFT may look for,
    `dropout` what it was trained with, for who trains it further there: told where all that it targets are modules.

    Raises UsageError if the folder exists, UnsupportedError for what PEFT cannot hold, DiskError.
    """
    with new_folder(folder, needed_bytes=sum(factor.nbytes for factor in adapter.parameters)) as partial:
        write_peft_files(partial, adapter, base_model=base_model, dropout=dropout)


def write_peft_files(folder: Path, adapter: Adapter, *, base_model: str | None = None, dropout: float = 0.0) -> None:
    """The same into a folder that is there, in place of what is. Raises UnsupportedError, DiskError."""
    raw = _config_json(adapter, base_model, dropout)
    specs = [_to_write(name, tensor) for name, tensor in _peft_tensors(adapter)]
    with new_file(folder / TENSOR_FILE) as file:
        file.write(header_bytes(specs, {"format": "pt"} | _metadata(adapter)))
        for _ in write_data(file, specs):
            pass
    write_text(folder / CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def check_storable(config: ModelConfig, spec: AdapterSpec) -> None:
    """Raises UnsupportedError for an adapter that PEFT cannot hold: better before it is trained."""
    if config.num_experts == 1 and any(name.endswith(EXPERT_KINDS) for name in spec.targets):
        raise UnsupportedError("PEFT cannot adapt the experts of a model that has one; leave gate_up and down out")


def _metadata(adapter: Adapter) -> dict[str, str]:
    said = dict(_DITHERED) if adapter.dithered else {}
    return said if adapter.harmony is None else said | {_CHAT_FORMAT: _CHAT_FORMATS[adapter.harmony]}


def _to_write(name: str, tensor: Tensor) -> TensorToWrite:
    return TensorToWrite(name, tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def _config_json(adapter: Adapter, base_model: str | None, dropout: float) -> dict[str, object]:
    config, targets = adapter.config, adapter.spec.targets
    check_storable(config, adapter.spec)
    # PEFT has one rank and one alpha, and exceptions by name. It honours exceptions for parameters too, and warns that
    # it did not: so the rule is what is commonest among parameters, where there are any.
    of_parameters = [target for name, target in targets.items() if name.endswith(tuple(_PARAMETERS))]
    ruling = of_parameters or [*targets.values()]
    [(rank, _)] = Counter(target.rank for target in ruling).most_common(1)
    [(alpha, _)] = Counter(target.alpha for target in ruling).most_common(1)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": adapter.spec.rslora,
        "lora_dropout": 0.0 if of_parameters else dropout,  # PEFT loads no parameters with any; only training asks
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": _named_shortly(config, targets, _MODULES),
        "target_parameters": _named_shortly(config, targets, _PARAMETERS) or None,
        "rank_pattern": _exceptions({name: target.rank for name, target in targets.items()}, rank),
        "alpha_pattern": _exceptions({name: _number(target.alpha) for name, target in targets.items()}, _number(alpha)),
    }


def _exceptions(values: Mapping[str, int | float], rule: int | float) -> dict[str, int | float]:
    """What differs from the rule: under a path alone where all layers agree, or else under its name in each layer."""
    patterns: dict[str, int | float] = {}
    for kind, path in _PATHS.items():
        of_kind = {_layer_and_kind(name)[0]: value for name, value in values.items() if name.endswith(f".{kind}")}
        agreed = len(set(of_kind.values())) == 1
        patterns |= {path if agreed else _key(layer, kind): n for layer, n in of_kind.items() if n != rule}
    return patterns


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _named_shortly(config: ModelConfig, targets: Mapping[str, Target], paths: Mapping[str, str]) -> list[str]:
    """Short where every layer has it, or else its name in each layer. Modules go by their last name, as everywhere."""
    names: list[str] = []
    for kind, path in paths.items():
        layers = [layer for layer in range(config.num_layers) if f"layers.{layer}.{kind}" in targets]
        short = path.removeprefix("self_attn.")
        names += [short] if len(layers) == config.num_layers else [_key(layer, kind) for layer in layers]
    return names


def _peft_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for name in factor_shapes(adapter.config, adapter.spec):
        layer, kind = _layer_and_kind(name)
        a, b = (factor.detach() for factor in adapter.factors[name])
        if kind in EXPERT_KINDS:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1, 2)
        module = _MODULES.get(kind) or _PARAMETERS[kind].rpartition(".")[0]
        # PEFT wraps a module's parameters in the order in which the module has them: what comes later is outside.
        inner = ".base_layer" if kind == "gate_up" and f"layers.{layer}.down" in adapter.factors else ""
        stem = f"base_model.model.model.layers.{layer}.{module}{inner}"
        yield f"{stem}.lora_A.weight", a
        yield f"{stem}.lora_B.weight", b


# --- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _PeftConfig:
    """What of an adapter_config.json decides how its tensors act. Patterns are tried in order, as PEFT tries them."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]

    def target(self, layer: int, kind: str) -> Target:
        key = _key(layer, kind)
        rank = next((rank for pattern, rank in self.ranks.items() if _fits(pattern, key)), self.rank)
        alpha = next((alpha for pattern, alpha in self.alphas.items() if _fits(pattern, key)), self.alpha)
        return Target(rank=rank, alpha=alpha)

    def targets_parameter(self, layer: int, kind: str) -> bool:
        key = _key(layer, kind)
        return any(key == name or key.endswith(f".{name}") for name in self.parameters)


def read_peft(folder: Path, config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> Adapter:
    """An adapter that PEFT or `write_peft` wrote, checked against the model that it is for; not trainable as it comes.

    Raises ModelNotFoundError if there is none, CheckpointError if it is damaged, MisfitError if it does not fit,
    UnsupportedError for what adapters can do in PEFT and not here.
    """
    path = _tensor_file(folder)
    found = _found(folder, path, config)
    shapes = factor_shapes(config, found.spec)
    stored = _read_tensors(path)
    factors = {
        name: _canonical(path, name, stored[place], *shapes[name], dtype) for name, place in found.places.items()
    }
    said = _read_metadata(path)
    return Adapter(
        config=config,
        spec=found.spec,
        factors=factors,
        dithered=_DITHERED.items() <= said.items(),
        harmony=_said_harmony(said),
    )


def base_model_of(folder: Path) -> str | None:
    """What an adapter says it was trained on; None where it says nothing. Raises CheckpointError."""
    path = folder / CONFIG_FILE
    named = read_json(path, most_bytes=_MOST_CONFIG_BYTES).get("base_model_name_or_path") if path.is_file() else None
    return named if isinstance(named, str) and named else None


def learnt_harmony(folder: Path) -> bool | None:
    """Whether an adapter learnt from chats in Harmony, or by its model's template; None where it does not say."""
    return _said_harmony(_read_metadata(_tensor_file(folder)))


def read_spec(folder: Path, config: ModelConfig) -> AdapterSpec:
    """What an adapter targets, from its config and the names of its tensors; raises what `read_peft` does of that."""
    return _found(folder, _tensor_file(folder), config).spec


class _Found(NamedTuple):
    """An adapter's targets, and layer and module that the file has each of them under."""

    spec: AdapterSpec
    places: dict[str, tuple[int, str]]


def _found(folder: Path, path: Path, config: ModelConfig) -> _Found:
    peft = _read_config(folder / CONFIG_FILE)
    infos = read_header(path, most_bytes=_MOST_HEADER_BYTES)
    stored = _placed(path, infos)
    targets: dict[str, Target] = {}
    places: dict[str, tuple[int, str]] = {}
    for layer, module in stored:
        if layer >= config.num_layers:
            raise MisfitError(
                f"{path}: layer {layer} is adapted and the model has {config.num_layers}; the adapter is for another"
            )
        kind = _kind(path, peft, layer, module, stored)
        name = f"layers.{layer}.{kind}"
        targets[name] = peft.target(layer, kind)
        places[name] = layer, module
        if kind in EXPERT_KINDS and config.num_experts == 1:
            raise UnsupportedError(f"{path}: {name} adapts the experts of a model that has one; PEFT does not do that")
    _check_complete(path, peft, config, targets)
    spec = AdapterSpec(targets=targets, rslora=peft.rslora)
    for name, shapes in factor_shapes(config, spec).items():
        pair = stored[places[name]]
        _check_pair(path, name, {letter: infos[tensor] for letter, tensor in pair.items()}, *shapes)
    return _Found(spec, places)


def _check_pair(
    path: Path, name: str, pair: Mapping[str, TensorInfo], a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    """By the header alone, before memory is planned or taken for what it claims."""
    rows = math.prod(a_shape[:-1])
    for letter, expected in (("A", (rows, a_shape[-1])), ("B", (b_shape[-2], rows))):
        if letter not in pair:
            raise CheckpointError(f"{path}: lora_{letter} of {name} is missing; download or copy the adapter again")
        info = pair[letter]
        if info.dtype not in _FACTOR_TYPES:
            raise CheckpointError(
                f"{path}: lora_{letter} of {name} is stored as {info.dtype_name:.20}; save the adapter in float32, "
                "float16 or bfloat16"
            )
        if info.shape != expected:
            raise MisfitError(
                f"{path}: lora_{letter} of {name} has shape {info.shape!s:.80}; rank {a_shape[-2]} and this model "
                f"ask for {expected}: the adapter is for another model, or its two files do not belong together"
            )


def _tensor_file(folder: Path) -> Path:
    if not (folder / CONFIG_FILE).is_file():
        raise ModelNotFoundError(f"{folder} holds no {CONFIG_FILE}; name the folder of an adapter")
    path = folder / TENSOR_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsupportedError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run code; save the adapter as {TENSOR_FILE}"
            )
        raise ModelNotFoundError(f"{folder} holds no {TENSOR_FILE}; download or copy the adapter again")
    return path


def _canonical(
    path: Path,
    name: str,
    pair: Mapping[str, Tensor],
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Factors:
    experts = a_shape[:-2]  # none for a linear layer
    a, b = pair["A"].to(dtype), pair["B"].to(dtype)
    for letter, factor in (("A", a), ("B", b)):  # as they are computed with: what is finite in float64 may not be here
        if not bool(factor.isfinite().all()):
            raise CheckpointError(f"{path}: lora_{letter} of {name} holds values that are not finite; train it again")
    if experts:
        a = a.reshape(a_shape)
        b = b.reshape(b_shape[-2], b_shape[-1], *experts).permute(2, 0, 1).contiguous()
    return Factors(a, b)


def _kind(path: Path, peft: _PeftConfig, layer: int, module: str, stored: Mapping[tuple[int, str], object]) -> str:
    """What a module's tensors adapt. An experts module has two parameters; its tensors do not say which they are of."""
    for kind, name in _MODULES.items():
        if module == name:
            return kind
    if module == "mlp.router" and peft.targets_parameter(layer, "router"):
        return "router"
    wrappers = [name for name in ("mlp.experts.base_layer", "mlp.experts") if (layer, name) in stored]
    wanted = [kind for kind in EXPERT_KINDS if peft.targets_parameter(layer, kind)]
    if module in wrappers:
        if len(wrappers) == len(wanted):
            return wanted[wrappers.index(module)]
        raise CheckpointError(
            f"{path}: layer {layer} has factors for {len(wrappers)} of the experts' parameters, and {CONFIG_FILE} "
            f"targets {' and '.join(wanted) or 'none'} of them; the two files do not belong together"
        )
    raise UnsupportedError(
        f"{path}: {module} of layer {layer} is nothing Freehold adapts; it knows {', '.join(_PATHS.values())}"
    )


def _check_complete(path: Path, peft: _PeftConfig, config: ModelConfig, targets: Mapping[str, Target]) -> None:
    for layer in range(config.num_layers):
        for kind in _PARAMETERS:
            if peft.targets_parameter(layer, kind) and f"layers.{layer}.{kind}" not in targets:
                raise MisfitError(
                    f"{path}: {CONFIG_FILE} targets {_key(layer, kind)} and there are no factors for it; "
                    "download or copy the adapter again"
                )


def _read_tensors(path: Path) -> dict[tuple[int, str], dict[str, Tensor]]:
    """By layer and module: the two factors, as they lie in the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                place: {letter: file.get_tensor(name) for letter, name in names.items()}
                for place, names in _placed(path, file.keys()).items()
            }
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download or copy the adapter again") from None


def _placed(path: Path, names: Iterable[str]) -> dict[tuple[int, str], dict[str, str]]:
    """By layer and module: the names of the two factors."""
    placed: dict[tuple[int, str], dict[str, str]] = {}
    for name in names:
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise UnsupportedError(
                f"{path}: tensor {name:.200} is no LoRA factor of gpt-oss's layers, which are called "
                "base_model.model.model.layers.N.….lora_A.weight and lora_B; Freehold adapts nothing else"
            )
        layer, module, letter = match.groups()
        placed.setdefault((int(layer), module), {})[letter] = name
    if not placed:
        raise CheckpointError(f"{path} holds no tensors; download or copy the adapter again")
    return placed


def _said_harmony(metadata: Mapping[str, str]) -> bool | None:
    said = metadata.get(_CHAT_FORMAT)
    return next((harmony for harmony, word in _CHAT_FORMATS.items() if word == said), None)


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!s:.200}); download or copy the adapter again") from None


def _read_config(path: Path) -> _PeftConfig:
    raw = read_json(path, most_bytes=_MOST_CONFIG_BYTES)
    if raw.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {raw.get('peft_type')!r:.80}; Freehold reads LORA")
    for name, value in raw.items():
        if name in _WITHOUT_EFFECT | _HONOURED or not value or (name == "bias" and value == "none"):
            continue
        what = _REFUSED.get(name, "an option of PEFT that Freehold does not know")
        raise UnsupportedError(
            f"{path}: {name:.80} is {value!r:.80} ({what}); Freehold reads plain LoRA: train without it"
        )
    init = raw.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise UnsupportedError(
            f"{path}: init_lora_weights {init!r:.80} also changed the base model's weights; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    rank, alpha, rslora = raw.get("r", 8), raw.get("lora_alpha", 8), raw.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise CheckpointError(
            f"{path}: use_rslora is {rslora!r:.80}, not true or false; train or save the adapter again"
        )
    parameters = raw.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise CheckpointError(f"{path}: target_parameters is {parameters!r:.80}, not a list of names; save it again")
    ranks, alphas = _patterns(path, raw, "rank_pattern"), _patterns(path, raw, "alpha_pattern")
    return _PeftConfig(
        rank=_whole(path, "r", rank),
        alpha=_positive(path, "lora_alpha", alpha),
        rslora=rslora,
        ranks={key: _whole(path, f"rank_pattern of {key}", value) for key, value in ranks.items()},
        alphas={key: _positive(path, f"alpha_pattern of {key}", value) for key, value in alphas.items()},
        parameters=tuple(parameters),
    )


def _positive(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 2**31:
        raise CheckpointError(f"{path}: {name:.200} is {value!r:.80}, not a positive number; save the adapter again")
    return float(value)


def _whole(path: Path, name: str, value: Any) -> int:
    number = _positive(path, name, value)
    if not number.is_integer():
        raise CheckpointError(f"{path}: {name:.200} is {value!r:.80}, not a whole number; save the adapter again")
    return int(number)


def _patterns(path: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {name} is {patterns!r:.80}, not an object; save it again")
    ways = 0
    for pattern in patterns:
        try:
            ways += max(_ways(pattern), _LEAST_WAYS)
            if ways > _MOST_WAYS:
                raise UsageError("with regular expressions that match in so many ways reading it may never end")
            _compiled(pattern)
        except (re.error, RecursionError, OverflowError, UsageError) as error:
            raise UnsupportedError(
                f"{path}: {name} has {pattern!r:.80} ({error}); name the module itself, such as {_key(0, 'q')}"
            ) from None
    return patterns


def _ways(pattern: str) -> int:
    """PEFT takes these for regular expressions. At most in how many ways one could match a name of 40 characters:
    each repetition ends anywhere, and each group has one of the alternatives. Raises UsageError for repeated groups."""
    pattern = pattern.replace("(?:", "(")
    if len(pattern) > 500 or re.search(r"[)}*+?][*+{]", pattern):
        raise UsageError("a regular expression with repeated groups may never end")
    alternatives = pattern.count("|") + 1
    ways: int = 41 ** len(re.findall(r"[*+?{]", pattern)) * alternatives ** (pattern.count("(") + 1)
    return ways


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _fits(pattern: str, key: str) -> bool:
    return _compiled(pattern).match(key) is not None


def _key(layer: int, kind: str) -> str:
    """A target's name in transformers' model, which PEFT's patterns and lists are held against."""
    return f"model.layers.{layer}.{_PATHS[kind]}"


def _layer_and_kind(name: str) -> tuple[int, str]:
    _, layer, kind = name.split(".")
    assert kind in KINDS
    return int(layer), kind
