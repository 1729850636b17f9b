"""The default model: a small stand-in that speaks Harmony, so that everything runs at once on any machine.

SmolLM2-135M-Instruct in the gpt-oss architecture (default_base.py), with the adapter folded in that `recipes/default`
tuned on Harmony: reasoning, an answer, calls of functions and of the built-in tools. The adapter comes inside this
package; what it can and cannot do stands in the model's card, data/default_model.md.
"""

from importlib import resources
from pathlib import Path

from freehold import paths
from freehold.disk import scratch_folder
from freehold.formats.harmony.vocabulary import CALL, RETURN
from freehold.formats.tokenizer import Tokenizer
from freehold.hub import default_base
from freehold.hub.convert import side_files
from freehold.hub.in_harmony import json_file
from freehold.hub.merge import merge
from freehold.log import Progress, no_progress

# The number counts tunings and templates: what an older one made is not taken for the present one.
NAME = "smollm2-135m-gpt-oss-harmony-2"
_DATA = resources.files("freehold.hub") / "data"


def folder() -> Path:
    """Where the default model lives once it has been made."""
    return paths.models_dir() / NAME


def ensure(progress: Progress = no_progress) -> Path:
    """The default model's folder, made of its base if this is the first use, which may fetch that.

    Raises DownloadError when the base cannot be had.
    """
    return default_base.made_once(folder(), lambda destination: _make(destination, progress))


def _make(destination: Path, progress: Progress) -> None:
    with scratch_folder(destination) as scratch:
        base = default_base.folder()
        if not base.is_dir():  # nobody asked for it by name, so it is not kept
            base = scratch / default_base.NAME
            default_base.make(base, progress)
        _merge(base, destination, progress)


def _merge(base: Path, destination: Path, progress: Progress) -> None:
    own = _side_files(Tokenizer.from_file(base / "tokenizer.json"))
    with resources.as_file(_DATA / "default_adapter") as adapter:
        merge(base, adapter, destination, beside=side_files(base, harmony=True) | own, progress=progress)


def _side_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Those that are not its base's."""
    ends = (RETURN, CALL, "<|endoftext|>", "<|im_end|>")
    return {
        "generation_config.json": json_file(
            {
                "bos_token_id": tokenizer.control_id("<|endoftext|>"),
                "eos_token_id": [tokenizer.control_id(name) for name in ends],
                "pad_token_id": tokenizer.control_id("<|endoftext|>"),
                "do_sample": False,
                "max_new_tokens": 512,  # so small a model may repeat itself without end
            }
        ),
        "tokenizer_config.json": json_file(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|endoftext|>",
                "eos_token": RETURN,
                "pad_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
            }
        ),
        "README.md": (_DATA / "default_model.md").read_bytes(),
    }
