"""What a model's files say to other programs once it has learnt Harmony: a template, and where an answer ends.

Freehold itself renders Harmony from code, and needs neither. Called where the files of a model are put together
(convert.py); writes none itself.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from freehold.errors import CheckpointError
from freehold.formats.chat import speaks_of_harmony
from freehold.formats.harmony.vocabulary import CALL, RETURN
from freehold.formats.tokenizer import Tokenizer

_TEMPLATE = resources.files("freehold.hub") / "data" / "harmony.jinja"


def in_harmony(files: Mapping[str, bytes], source: Path) -> dict[str, bytes]:
    """The files, by name, that belong to the model in the folder `source` besides its tensors. Where a template says
    otherwise, Harmony's takes its place, and answers end as in Harmony; one that speaks of Harmony, or none, is left,
    with all else: then the vocabulary says how the model chats. Raises CheckpointError where a file that has to change
    is not a JSON object."""
    about_tokens = _read(files, "tokenizer_config.json")
    templates = [files.get("chat_template.jinja", b"").decode("utf-8", "replace")]
    if "chat_template" in about_tokens:  # one, or several with names
        templates.append(json.dumps(about_tokens["chat_template"]))
    if not any(templates) or any(map(speaks_of_harmony, templates)):
        return dict(files)
    about_tokens.pop("chat_template", None)
    about_tokens["eos_token"] = RETURN
    changed = {
        "chat_template.jinja": _TEMPLATE.read_bytes(),
        "tokenizer_config.json": json_file(about_tokens),
    }
    tokenizer = "tokenizer.json"
    known = Tokenizer.from_file(source / tokenizer).control_tokens if tokenizer in files else {}
    if ends := [known[name] for name in (RETURN, CALL) if name in known]:
        generation = _read(files, "generation_config.json")
        before = generation.get("eos_token_id", [])
        ends += [token for token in (before if isinstance(before, list) else [before]) if token not in ends]
        changed["generation_config.json"] = json_file(generation | {"eos_token_id": ends})
    return {**files, **changed}


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds {type(content).__name__}, not an object; download it again")
    return content


def json_file(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
