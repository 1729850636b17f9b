"""A model folder as one GGUF file for llama.cpp: tensors, tokeniser and chat template, whole or not at all."""

from pathlib import Path

from freehold.config import DenseFormat, ExpertFormat
from freehold.disk import new_file
from freehold.errors import CheckpointError
from freehold.formats.harmony.vocabulary import RETURN
from freehold.hub.folder import ModelFolder, open_folder
from freehold.log import Progress, logger, no_progress
from freehold.weights import gguf_export
from freehold.weights.gguf_export import Metadata, MetadataValue
from freehold.weights.layouts import TableSource

# For folders that do not say, as those of the original layout: o200k_harmony's names.
_USUAL_NAMES = {"bos_token": "<|startoftext|>", "eos_token": RETURN, "pad_token": "<|endoftext|>"}


def export(
    source: Path,
    destination: Path,
    *,
    dense: DenseFormat = DenseFormat.Q8,
    experts: ExpertFormat | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write the model in `source` to the new file `destination`.

    `dense` says how matrices that are not MXFP4 are stored; `experts` None keeps MXFP4 experts as they are, to the
    bit. Raises UnsupportedError before writing where llama.cpp cannot run the model as it is.
    """
    folder = open_folder(source)
    if folder.chat_template is None:
        logger.warning("the model has no chat template, so %s has none: pass llama.cpp one to chat", destination)
    checkpoint = folder.checkpoint
    experts = experts or checkpoint.experts
    metadata = {
        **gguf_export.architecture(checkpoint.config, name=destination.stem, dense=dense, experts=experts),
        **_vocabulary(folder),
    }
    table = TableSource(checkpoint.table(), origin=str(source))
    tensors = gguf_export.tensors_to_write(checkpoint.config, table, dense=dense, experts=experts)
    with new_file(destination, replace=False, needed_bytes=gguf_export.num_bytes(metadata, tensors)) as file:
        gguf_export.write(file, metadata, tensors, progress=progress)


def _vocabulary(folder: ModelFolder) -> Metadata:
    if folder.tokenizer is None:
        raise CheckpointError(
            f"{folder.path} holds no tokenizer.json, and llama.cpp runs no model without its tokeniser; copy it there"
        )
    vocabulary = folder.tokenizer.to_gguf(num_tokens=folder.checkpoint.config.vocab_size)
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "gpt2",  # byte-level BPE
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    names = _USUAL_NAMES | dict(folder.template_variables)
    # Where no end of turn is named, llama.cpp takes one of several likely tokens, whichever it meets first.
    names["eot_token"] = folder.template_variables.get("eot_token", names["eos_token"])
    for role, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("pad", "padding")):
        token_id = folder.tokenizer.control_tokens.get(names[f"{role}_token"])
        if token_id is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = token_id
    if folder.chat_template is not None:
        metadata["tokenizer.chat_template"] = folder.chat_template
    return metadata
