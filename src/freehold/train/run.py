"""A run from its files to its result: read, plan, load, train, write down. What `freehold tune` is made of.

    DIR/run.json            everything that decides what comes out: model, data, options, how it is computed
    DIR/metrics.jsonl       as it goes on (metrics.py), and curves.png where matplotlib is there
    DIR/checkpoints/        where it can go on (checkpoints.py)
    DIR/adapter_config.json, adapter_model.safetensors, README.md     the result, when it is done; of full fine-tuning
    DIR/model/              a checkpoint

`prepare` reads and checks all that can be known without the model's weights. A run that goes on is refused where its
data, its model or its options are no longer those that it began with.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from freehold import __version__, machine
from freehold.config import ModelConfig
from freehold.disk import check_space, exclusive, write_text, written_to
from freehold.errors import CheckpointError, FreeholdError, UnsupportedError, UsageError
from freehold.formats import chat
from freehold.formats.chat import ChatFormat, HarmonyFormat
from freehold.formats.conversation import SystemContent
from freehold.formats.harmony.vocabulary import speaks_harmony
from freehold.formats.tokenizer import Tokenizer
from freehold.hub.bases import naming_base
from freehold.hub.find import BUILT_IN, find_model
from freehold.hub.folder import ModelFolder, open_folder
from freehold.kernels.kv import PAGE, num_pages
from freehold.log import NOTICE, Progress, logger, no_progress
from freehold.model.lora import KINDS, Adapter, AdapterSpec, factor_shapes
from freehold.model.peft_files import CONFIG_FILE, TENSOR_FILE, check_storable, read_peft
from freehold.session.model import load_transformer, mention_other_base
from freehold.session.policy import DTYPES, Policy, decide
from freehold.train import curves
from freehold.train.adapting import adapter_spec, starting_adapter
from freehold.train.card import model_card
from freehold.train.data import DataOptions, PreferenceData, TrainingData, read_examples, read_preferences
from freehold.train.dpo import DpoTuning
from freehold.train.examples import Examples, Pairs
from freehold.train.full import FullTuning, trained_names
from freehold.train.loop import End, Loop, Outcome
from freehold.train.metrics import Report, read_metrics
from freehold.train.options import (
    DEFAULT_TARGETS,
    METHODS,
    DpoOptions,
    FullOptions,
    LoopOptions,
    LoraOptions,
    LoraTarget,
    differences,
)
from freehold.train.packing import pack
from freehold.train.plan import RowShape, TrainingPlan, fitting_full_plan, fitting_lora_plan
from freehold.train.sft import LoraTuning
from freehold.weights.files import read_json
from freehold.weights.layouts import Checkpoint, canonical_shapes
from freehold.weights.pack_file import source_fingerprint

RUN_FILE = "run.json"
MODEL_FOLDER = "model"
METRICS_FILE = "metrics.jsonl"
CHART_FILE = "curves.png"
_FORMAT = 1
_MOST_RUN_BYTES = 16 << 20
_SECONDS_BETWEEN_CHARTS = 60.0
_ANEW = "begin anew with another --output"
_MEASURE_ANOTHER = "take it away, and name a file with --measure"
_READ_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
"""What of a model, besides config.json and tensors, decides what a run computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What somebody wants tuned. `method` is one of METHODS; `dpo` and `full` are for those alone. `adapter` is the
    folder of one to go on with, None is a new one. `harmony` as in `freehold chat`; `date` is what Harmony's system
    message says, None is today. A share of the lines is for validation, or a file is. The rest as in
    freehold.session.model.load."""

    model: str
    files: tuple[Path, ...]
    method: str = "lora"
    adapter: Path | None = None
    validation_file: Path | None = None
    validation_share: float = 0.0
    harmony: bool | None = None
    date: str | None = None
    loop: LoopOptions
    lora: LoraOptions
    dpo: DpoOptions = field(default_factory=DpoOptions)
    full: FullOptions = field(default_factory=FullOptions)
    device: str | None = None
    dtype: str | None = None
    dense: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method is one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method != "dpo" and self.dpo != DpoOptions():
            raise UsageError("--beta and --label-smoothing are for preference pairs; add --method dpo")
        if self.method != "full" and self.full != FullOptions():
            raise UsageError("--train is for full fine-tuning, and adapters have --target; add --method full")
        if self.adapter is not None:
            self._check_adapter(self.adapter)
        elif self.method != "full" and not self.lora.targets:
            raise UsageError(
                f"there is nothing to train; name one or more --target, such as {','.join(DEFAULT_TARGETS)}"
            )
        if self.method == "full":
            if self.lora.qat:
                raise UsageError("--qat is for adapters; full fine-tuning computes with rounded weights anyway")
            if self.dense is not None:
                raise UsageError("--dense is for packed weights, and full fine-tuning computes with plain ones")
        if not self.files:
            raise UsageError("there is nothing to train on; name one or more .jsonl or .txt files")
        if self.validation_file is not None and self.validation_share:
            raise UsageError(
                "validation is a file (--validation) or a share of the lines (--validation-share), not both"
            )
        if self.loop.patience is not None and self.validation_file is None and not self.validation_share:
            raise UsageError(
                "--patience stops when the validation loss no longer falls, and there is none; give --validation FILE "
                "or --validation-share"
            )

    def _check_adapter(self, adapter: Path) -> None:
        if self.method == "full":
            raise UsageError(f"--method full trains no adapter; `freehold merge` {adapter} first, and tune the result")
        if self.lora.targets or self.lora.rslora:
            raise UsageError(f"{adapter} has targets and ranks of its own; leave --target, --rank and their like out")
        if self.method == "dpo" and self.lora.qat:
            raise UsageError(
                "--method dpo with --qat compares with the model as it is stored, which has no adapter; `freehold "
                f"merge` {adapter} first, and tune the result"
            )

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        raw = asdict(self)
        raw["model"] = model_location(self.model)
        raw["files"] = [location(path) for path in self.files]
        for name in ("adapter", "validation_file"):
            path = getattr(self, name)
            raw[name] = None if path is None else location(path)
        raw["lora"]["targets"] = [list(target) for target in self.lora.targets]
        raw["full"]["train"] = list(self.full.train)
        return raw

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "TuneRequest":
        fields = dict(raw)
        fields["files"] = tuple(map(Path, raw["files"]))
        for name in ("adapter", "validation_file"):
            path = raw.get(name)  # runs that began before adapters went on have no `adapter`
            fields[name] = None if path is None else Path(path)
        lora = dict(raw["lora"])
        lora["targets"] = tuple(LoraTarget(*target) for target in lora["targets"])
        fields["lora"], fields["loop"] = LoraOptions(**lora), LoopOptions(**raw["loop"])
        if "dpo" in raw:  # runs that began before there was anything but LoRA have neither
            fields["dpo"] = DpoOptions(**raw["dpo"])
            fields["full"] = FullOptions(**{**raw["full"], "train": tuple(raw["full"]["train"])})
        return cls(**fields)


def model_location(name: str) -> str:
    """A name, or the folder that it is, from wherever one looks."""
    return location(name) if name not in BUILT_IN and Path(name).is_dir() else name


def location(path: Path | str) -> str:
    """The same from wherever one looks, and however it was spelt, as far as links, which keep their names, let one
    tell."""
    absolute = Path(path).absolute()
    normal = Path(os.path.normpath(absolute))
    return str(normal if normal.resolve() == absolute.resolve() else absolute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that can begin, as far as one knows without the weights. `harmony` is whether its chats are written in
    Harmony, None where it has none."""

    request: TuneRequest
    folder: ModelFolder
    policy: Policy
    tokenizer: Tokenizer
    data: TrainingData | PreferenceData
    spec: AdapterSpec | None
    row: RowShape
    rows_per_epoch: int
    harmony: bool | None
    facts: Mapping[str, Any]

    @property
    def num_steps(self) -> int:
        return self.request.loop.num_steps(self.rows_per_epoch)

    @property
    def num_parameters(self) -> int:
        """That learn."""
        return int(self.facts["parameters"])

    def plan(self) -> TrainingPlan:
        """Raises OutOfMemoryError where a step would not fit."""
        checkpoint = self.folder.checkpoint
        if self.spec is None:
            return fitting_full_plan(
                checkpoint.config,
                checkpoint.experts,
                self.policy,
                trained_names(checkpoint, self.request.full),
                self.row,
                checkpointing=self.request.loop.checkpointing,
            )
        return fitting_lora_plan(
            self.folder.checkpoint.config,
            self.folder.checkpoint.experts,
            self.policy,
            self.spec,
            self.row,
            dropout=self.request.lora.dropout > 0,
            qat=self.request.lora.qat,
            compared=self.request.method == "dpo" and self.request.adapter is not None,
            checkpointing=self.request.loop.checkpointing,
        )


def prepare(request: TuneRequest, progress: Progress = no_progress) -> Prepared:
    """Raises UsageError and other FreeholdErrors that name the option, the file or the lines, and the remedy."""
    folder = open_folder(find_model(request.model, progress))
    config = folder.checkpoint.config
    begins_with = None if request.adapter is None else _read_adapter(request.adapter, request, folder)
    spec, policy = _learning(request, config, begins_with)
    max_length = request.loop.max_length
    if max_length > config.max_context:
        raise UsageError(
            f"--max-length {max_length} is more than this model's context of {config.max_context}: give that at most"
        )
    tokenizer = folder.tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{folder.path} has no tokenizer.json; add the tokeniser that the model was trained with")
    request = _resolved(request, policy)
    harmony = request.harmony
    if harmony is None and begins_with is not None:
        harmony = begins_with.harmony
        if harmony and not speaks_harmony(tokenizer):
            raise UsageError(
                f"{request.adapter} learnt Harmony, which the tokeniser of {folder.path} lacks; add --no-harmony, or "
                "choose the model that it is for"
            )
    chat_format = chat_format_of(folder, tokenizer, system=SystemContent(date=request.date), harmony=harmony)
    options = DataOptions(max_length=max_length, validation_share=request.validation_share, seed=request.loop.seed)
    data = _read(request, request.files, chat_format, tokenizer, options, progress)
    if request.validation_file is not None:
        options = DataOptions(max_length=max_length, seed=request.loop.seed)
        measured = _read(request, [request.validation_file], chat_format, tokenizer, options, progress)
        data.truncations.extend(measured.truncations)
        data = replace(data, validation=measured.training)  # type: ignore[arg-type]
    elif request.validation_share and not len(data.validation):
        raise UsageError(
            f"--validation-share {request.validation_share:g} holds none of these {data.num_lines} lines out; give a "
            "larger share, or a file (--validation)"
        )
    rows = _rows(data.training, max_length)
    facts = _facts(request, folder, policy, data, spec)
    _mention_what_is_learnt_too(request.validation_file, facts["data"])
    return Prepared(
        request=request,
        folder=folder,
        policy=policy,
        tokenizer=tokenizer,
        data=data,
        spec=spec,
        row=_row_shape(data, rows, max_length),
        rows_per_epoch=len(rows),
        harmony=isinstance(chat_format, HarmonyFormat) if data.num_chats else None,
        facts=facts,
    )


def _read_adapter(path: Path, request: TuneRequest, folder: ModelFolder) -> Adapter:
    """What a run is to begin with, read to its end before anything is made. It is read again when it is to learn: the
    plan of memory has room for it once."""
    with naming_base(path, request.model, folder.path):
        adapter = read_peft(path, folder.checkpoint.config)
    mention_other_base(path, request.model, folder.path)
    if adapter.dithered and not request.lora.qat:
        logger.log(NOTICE, "%s was trained with --qat, and this run is not: what comes of it merges as others do", path)
    return adapter


def _learning(
    request: TuneRequest, config: ModelConfig, begins_with: Adapter | None
) -> tuple[AdapterSpec | None, Policy]:
    """What an adapter targets, if one is trained; and how the model runs."""
    is_full = request.method == "full"
    # Asked for in bfloat16, plain weights may have that on a CPU, too.
    dtype = None if is_full else request.dtype
    policy = decide(config, device=request.device, dtype=dtype, dense=request.dense, threads=request.threads)
    if is_full:
        chosen = torch.float32 if request.dtype is None else DTYPES.get(request.dtype.removeprefix("torch."))
        if chosen is None:
            raise UsageError(f"--dtype is one of {', '.join(DTYPES)}, got {request.dtype!r}")
        return None, replace(policy, dense=None, dtype=chosen)
    spec = adapter_spec(config, request.lora) if begins_with is None else begins_with.spec
    check_storable(config, spec)
    return spec, policy


def _read(
    request: TuneRequest,
    files: Sequence[Path],
    chat_format: ChatFormat | None,
    tokenizer: Tokenizer,
    options: DataOptions,
    progress: Progress,
) -> TrainingData | PreferenceData:
    if request.method != "dpo":
        return read_examples(files, chat_format, tokenizer, options, progress)
    if chat_format is None:
        raise UnsupportedError("preference pairs are chats, and this model has no chat format; choose another model")
    return read_preferences(files, chat_format, options, progress)


def _rows(training: Examples | Pairs, max_length: int) -> list[list[int]]:
    """What comes into one row. A pair has one of its own."""
    if isinstance(training, Pairs):
        return [[index] for index in range(len(training))]
    return pack(training.lengths, max_length, seed=0)


def _resolved(request: TuneRequest, policy: Policy) -> TuneRequest:
    """With all that was left to the day and the machine: a run that goes on elsewhere computes the same."""
    return replace(
        request,
        date=request.date or datetime.now().astimezone().date().isoformat(),
        device=str(policy.device),
        dtype=None if policy.native else str(policy.dtype).removeprefix("torch."),
        dense=policy.dense,
        threads=policy.threads,
    )


def chat_format_of(
    folder: ModelFolder, tokenizer: Tokenizer, *, system: SystemContent, harmony: bool | None
) -> ChatFormat | None:
    """How chats are written for a model; None for one that has no format, and was told none."""
    if folder.chat_template is None and harmony is None and not speaks_harmony(tokenizer):
        return None
    return chat.choose(
        tokenizer,
        folder.chat_template,
        folder.defaults.stop_ids,
        system=system,
        variables=folder.template_variables,
        harmony=harmony,
    )


def _row_shape(data: TrainingData | PreferenceData, rows: Sequence[Sequence[int]], max_length: int) -> RowShape:
    lengths, of_validation = data.training.lengths, data.validation.lengths
    longest = max(sum(lengths[index] for index in indices) for indices in rows)

    def paged(of_row: Iterable[int]) -> int:
        return sum(num_pages(length) * PAGE for length in of_row)

    if isinstance(data, PreferenceData):
        answers = (data.training.chosen, data.training.rejected, data.validation.chosen, data.validation.rejected)
        return RowShape(
            tokens=max(longest, *of_validation, 0),
            example=max(length for examples in answers for length in examples.lengths),
            paged=max(map(paged, zip(data.training.chosen.lengths, data.training.rejected.lengths, strict=True))),
        )
    return RowShape(
        tokens=max(longest, min(max_length, sum(of_validation))),
        example=max([*lengths, *of_validation]),
        # The row with the most tokens need not be the one with the most pages. Validation keeps none.
        paged=max(paged(lengths[index] for index in indices) for indices in rows),
    )


def _facts(
    request: TuneRequest,
    folder: ModelFolder,
    policy: Policy,
    data: TrainingData | PreferenceData,
    spec: AdapterSpec | None,
) -> dict[str, Any]:
    """What run.json says."""
    checkpoint = folder.checkpoint
    validation = [] if request.validation_file is None else [request.validation_file]
    return {
        "format": _FORMAT,
        "method": request.method,
        "freehold": __version__,
        "torch": torch.__version__,
        "model": {"name": request.model},
        "data": {
            "files": [file_facts(path) for path in request.files],
            "validation_files": [file_facts(path) for path in validation],
            "examples": len(data.training),
            "tokens": data.training.num_tokens,
            "targets": data.training.num_targets,
            "validation_examples": len(data.validation),
            "validation_targets": data.validation.num_targets,
            "truncated": data.truncations.count,
            "left_out": data.truncations.num_dropped,
        },
        **({} if request.adapter is None or spec is None else {"adapter": _adapter_facts(request.adapter, spec)}),
        "parameters": _num_parameters(request, checkpoint, spec),
        "how": policy.describe(checkpoint.experts.value),
        "request": request.to_json(),
    }


def _adapter_facts(folder: Path, spec: AdapterSpec) -> dict[str, Any]:
    """Of the one that a run begins with."""
    kinds = {(name.rpartition(".")[2], target.rank, target.alpha) for name, target in spec.targets.items()}
    return {
        "name": folder.absolute().name,
        "files": [file_facts(folder / name) for name in (CONFIG_FILE, TENSOR_FILE)],
        "targets": sorted(kinds, key=lambda each: (KINDS.index(each[0]), each[1:])),
        "rslora": spec.rslora,
    }


def _num_parameters(request: TuneRequest, checkpoint: Checkpoint, spec: AdapterSpec | None) -> int:
    if spec is None:
        shapes = canonical_shapes(checkpoint.config)
        return sum(math.prod(shapes[name]) for name in trained_names(checkpoint, request.full))
    return sum(math.prod(a) + math.prod(b) for a, b in factor_shapes(checkpoint.config, spec).values())


def _model_facts(folder: ModelFolder, progress: Progress) -> dict[str, Any]:
    """By what is in its files, whenever and wherever they were written: those that decide what it computes."""
    tensors = {info.file for info in folder.checkpoint.files.infos.values()}
    others = (folder.path / name for name in ("config.json", *_READ_BESIDE))
    paths = sorted({*tensors, *(path for path in others if path.is_file())})
    facts = []
    for number, path in enumerate(paths):
        progress("checking the model", number, len(paths))
        facts.append(file_facts(path))
    progress("checking the model", len(paths), len(paths))
    return {"files": facts}


def _mention_what_is_learnt_too(validation: Path | None, data: Mapping[str, Any]) -> None:
    learnt = {each["sha256"] for each in data["files"]}
    if any(each["sha256"] in learnt for each in data["validation_files"]):
        logger.warning(
            "%s is trained on too, so that its loss says nothing of other lines; --validation-share holds some back",
            validation,
        )


def file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": path.name, "bytes": file.tell(), "sha256": digest}


# --- a run's folder ---------------------------------------------------------------------------------------------


def new_run(prepared: Prepared, output: Path, progress: Progress = no_progress) -> None:
    """Make the folder of a run that begins. Raises UsageError where there is something already."""
    check_new(output)
    facts = dict(prepared.facts)
    facts["model"] = facts["model"] | _model_facts(prepared.folder, progress)
    with written_to(output):
        output.mkdir(parents=True, exist_ok=True)
    write_text(output / RUN_FILE, json.dumps(facts, indent=2) + "\n")


def check_new(output: Path) -> None:
    """Raises UsageError where a run cannot begin, and says how one that is there goes on."""
    if (output / RUN_FILE).is_file():
        if is_done(output):
            raise UsageError(f"{output} holds a run that is done; give another --output")
        raise UsageError(
            f"{output} holds an unfinished run; go on with `freehold tune --resume {output}`, or give another --output"
        )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists already; give another --output")


def is_done(output: Path) -> bool:
    """Whether the run in this folder has come to its end."""
    metrics = output / METRICS_FILE
    return metrics.is_file() and any(line.get("event") == "done" for line in read_metrics(metrics))


def resumed_request(output: Path, given: Mapping[str, Any]) -> TuneRequest:
    """What a run in this folder began with. `given` is what is asked for now, as run.json would have it: raises
    UsageError where that is something else, and where there is nothing to go on with."""
    if not (output / RUN_FILE).is_file():
        raise UsageError(f"{output} holds no {RUN_FILE}; name the --output of a run")
    if is_done(output):
        raise UsageError(f"{output} holds a run that is done; there is nothing to resume")
    facts = read_json(output / RUN_FILE)
    if facts.get("format") != _FORMAT:
        raise UnsupportedError(f"{output / RUN_FILE} is of another version of Freehold; resume with that one")
    with _of_a_run(output / RUN_FILE, _ANEW):
        raw = facts["request"]
        known = {**raw, **raw["loop"], **raw["lora"], **raw.get("dpo", {}), "train": raw.get("full", {}).get("train")}
        before = {"adapter": None, **known}
        request = TuneRequest.from_json(raw)
        before = {name: before[name] for name in given}
    if changed := differences(before, given):
        raise UsageError(
            f"a run goes on as it began, and {'; '.join(changed)}: leave that out, or begin anew with another --output"
        )
    return request


def recorded_request(output: Path) -> TuneRequest | None:
    """What the run in a folder was asked for, for whoever measures its adapter on the same data. None where no run says
    so, or one of another version. Raises CheckpointError where what says so is damaged: adapters come from anywhere."""
    path = output / RUN_FILE
    facts = read_json(path, most_bytes=_MOST_RUN_BYTES) if path.is_file() else {}
    if facts.get("format") != _FORMAT:
        return None
    with _of_a_run(path, _MEASURE_ANOTHER):
        return TuneRequest.from_json(facts["request"])


@contextmanager
def _of_a_run(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except FreeholdError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not what `freehold tune` writes ({type(error).__name__}: {error!s:.80}); {remedy}"
        ) from None


def check_held_out(prepared: Prepared, output: Path) -> None:
    """Raises UsageError where what is held out is not what the run in this folder held out: its file has changed, or
    the files that it was a share of; or they are read in another way by now."""
    now, otherwise = prepared.facts["data"], "name a file with --measure"
    kind = "files" if prepared.request.validation_file is None else "validation_files"
    with _of_a_run(output / RUN_FILE, _MEASURE_ANOTHER):
        before = read_json(output / RUN_FILE, most_bytes=_MOST_RUN_BYTES)["data"]
        _check_files(before[kind], now[kind], output, otherwise)
        if any(before[name] != now[name] for name in ("validation_examples", "validation_targets")):
            raise UsageError(f"what {output} held out is read in another way by now; {otherwise}")


def _check_files(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], output: Path, otherwise: str
) -> None:
    for old, new in zip(before, now, strict=True):
        if old != new:
            raise UsageError(
                f"{new['name']} is not what it was when {output} began (SHA-256 {new['sha256'][:12]}…, then "
                f"{old['sha256'][:12]}…); bring it back, or {otherwise}"
            )


def check_unchanged(prepared: Prepared, output: Path, progress: Progress = no_progress) -> None:
    """Raises UsageError where data or model are not those that the run in this folder began with: by what they hold, so
    that copies will do."""
    before = read_json(output / RUN_FILE)
    now = prepared.facts
    for kind in ("files", "validation_files"):
        _check_files(before["data"][kind], now["data"][kind], output, _ANEW)
    _check_files(before.get("adapter", {}).get("files", ()), now.get("adapter", {}).get("files", ()), output, _ANEW)
    if (changed := _changed_file(before["model"], prepared.folder, progress)) is not None:
        raise UsageError(
            f"the model {now['model']['name']} is not what it was when {output} began: {changed} has changed; bring it "
            f"back, or {_ANEW}"
        )
    if before["data"] != now["data"]:
        raise UsageError(f"the files of {output} are read in another way by now; {_ANEW}")
    for name in ("freehold", "torch", "how"):
        if before[name] != now[name]:
            logger.warning(
                "%s was %r when %s began, and is %r: it goes on, but not to the last bit as it would have",
                name, before[name], output, now[name],
            )  # fmt: skip


def _changed_file(before: Mapping[str, Any], folder: ModelFolder, progress: Progress) -> str | None:
    """The name of one, if any."""
    if "files" not in before:  # a run that began when names, sizes and times were what it kept
        return None if before["fingerprint"] == source_fingerprint(folder.checkpoint) else "one of its files"
    then, now = (
        {each["name"]: each for each in files} for files in (before["files"], _model_facts(folder, progress)["files"])
    )
    return min((name for name in {**then, **now} if then.get(name) != now.get(name)), default=None)


# --- training ---------------------------------------------------------------------------------------------------


def train(
    prepared: Prepared,
    output: Path,
    *,
    reports: Sequence[Report] = (),
    progress: Progress = no_progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train in a folder that `new_run` made, or go on with what is there, to the result.

    Raises OutOfMemoryError before anything is allocated where a step would not fit, UsageError where another process
    trains in this folder, and what Loop.run raises.
    """
    request = prepared.request
    plan = prepared.plan()
    run = read_json(output / RUN_FILE)
    with exclusive(output / RUN_FILE, wait=False), _torch_threads(prepared.policy):
        per_checkpoint = 3 * plan.factors
        check_space(output / RUN_FILE, (request.loop.save_total_limit + 3) * per_checkpoint)
        if plan.checkpointing:
            machine.return_large_memory()
        else:
            machine.keep_freed_memory()
        # As it was typed in the beginning, from wherever the run goes on.
        base_model = prepared.folder.path.name if prepared.request.model in BUILT_IN else run["model"]["name"]
        objective = _objective(prepared, base_model, checkpointing=plan.checkpointing, progress=progress)

        drawn = time.monotonic()

        def report(line: Mapping[str, Any]) -> None:
            nonlocal drawn
            if line.get("event") == "checkpoint" and time.monotonic() - drawn > _SECONDS_BETWEEN_CHARTS:
                _draw(output)
                drawn = time.monotonic()
            for each in reports:
                each(line)

        cut = prepared.data.truncations
        loop: Loop[Any] = Loop(
            objective,
            request.loop,
            output,
            report=report,
            progress=progress,
            should_stop=should_stop,
            notices=[f"truncated: {cut.describe(request.loop.max_length)}"] if cut.count else [],
        )
        loop.resume()

        def finish(outcome: Outcome) -> None:
            if outcome.best != outcome.last:
                objective.restore(outcome.best)
            best = outcome.state.best_step
            step = outcome.state.step if best is None else best
            name = output.absolute().name
            write_text(output / "README.md", model_card(name, run, outcome.state, result_step=step))
            if isinstance(objective, FullTuning):
                if not (output / MODEL_FOLDER).is_dir():  # whole, and this run's, which was killed right after it
                    objective.export(prepared.folder.path, output / MODEL_FOLDER, harmony=prepared.harmony)
            else:
                objective.save(output)
            try:
                _draw(output)
            except (FreeholdError, OSError) as error:  # what was learnt is there all the same
                logger.warning("the curves cannot be drawn: %s", error)

        try:
            outcome = loop.run(finish)
        except Exception:
            with suppress(FreeholdError, OSError):  # what went wrong is told; that there is no chart may have its cause
                _draw(output)
            raise
        if outcome.end is End.STOPPED:
            _draw(output)
        return outcome


def _objective(
    prepared: Prepared, base_model: str, *, checkpointing: bool, progress: Progress
) -> LoraTuning | DpoTuning | FullTuning:
    request, data = prepared.request, prepared.data
    if request.method == "full":
        assert isinstance(data, TrainingData)
        return FullTuning(
            prepared.folder.checkpoint,
            request.full,
            data,
            dtype=prepared.policy.dtype,
            device=prepared.policy.device,
            max_length=request.loop.max_length,
            seed=request.loop.seed,
            checkpointing=checkpointing,
        )
    transformer = load_transformer(prepared.folder, prepared.policy, progress=progress)
    seed = request.loop.seed
    adapter = starting_adapter(
        transformer.config,
        request.lora,
        seed=seed,
        begins_with=None if request.adapter is None else read_peft(request.adapter, transformer.config),
        device=transformer.device,
        harmony=prepared.harmony,
    )
    table = prepared.folder.checkpoint.table() if request.lora.qat else None
    if isinstance(data, PreferenceData):
        return DpoTuning(
            transformer,
            adapter,
            request.lora,
            request.dpo,
            data,
            seed=seed,
            checkpointing=checkpointing,
            base_model=base_model,
            table=table,
        )
    return LoraTuning(
        transformer,
        adapter,
        request.lora,
        data,
        max_length=request.loop.max_length,
        seed=seed,
        checkpointing=checkpointing,
        base_model=base_model,
        table=table,
    )


def _draw(output: Path) -> None:
    if curves.can_draw():
        curves.draw(read_metrics(output / METRICS_FILE), output / CHART_FILE)


@contextmanager
def _torch_threads(policy: Policy) -> Iterator[None]:
    """One where the native kernels have threads of their own, with which torch's would get in each other's way, as in
    backends.one_torch_thread. Else as many as the run began with: torch's sums may depend on it."""
    count = 1 if policy.native else policy.threads
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
