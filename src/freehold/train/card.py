"""The model card of an adapter: what it was made from, how, and with which result. Text only; called by run.py."""

from collections.abc import Mapping
from typing import Any

from freehold.train.checkpoints import TrainingState

_HEADER = """\
---
library_name: peft
base_model: {base}
pipeline_tag: text-generation
tags: [lora, gpt-oss, freehold]
license: # say under which licence you pass this on; it depends on the base model and on the training data
---
"""


def model_card(name: str, run: Mapping[str, Any], state: TrainingState, *, result_step: int) -> str:
    """`run` is what run.json says."""
    data, lora, loop = run["data"], run["request"]["lora"], run["request"]["loop"]
    files = "\n".join(f"| `{file['name']}` | {file['bytes']:,} | `{file['sha256']}` |" for file in data["files"])
    targets = "\n".join(f"| {kind} | {rank} | {alpha:g} |" for kind, rank, alpha in lora["targets"])
    options = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in loop.items() if value is not None)
    return (
        _HEADER.format(base=run["model"]["name"])
        + f"\n# {name}\n\n"
        + f"A LoRA adapter for `{run['model']['name']}`, made by Freehold {run['freehold']}. It changes nothing of the "
        "model's weights, and is read by Freehold and by PEFT.\n\n"
        "```\nfreehold chat --adapter <this folder>\n```\n\n"
        "## Data\n\n| file | bytes | SHA-256 |\n|---|---|---|\n"
        + files
        + f"\n\n{data['examples']:,} examples, {data['tokens']:,} tokens, of which {data['targets']:,} are learnt"
        + f"; {data['validation_examples']:,} examples ({data['validation_targets']:,} tokens) are for validation. "
        + f"{data['truncated']:,} were cut to {loop['max_length']:,} tokens.\n\n"
        "Say here where they come from, and what they may be used for.\n\n"
        "## Training\n\n| target | rank | alpha |\n|---|---|---|\n"
        + targets
        + f"\n\nrsLoRA: {'yes' if lora['rslora'] else 'no'}; dropout {lora['dropout']:g}; balance {lora['balance']:g}; "
        + f"{run['how']}\n\n"
        + options
        + "\n\n## Result\n\n"
        + _result(state, result_step)
    )


def _result(state: TrainingState, result_step: int) -> str:
    lines = [f"{state.step:,} steps over {state.tokens:,} tokens in {state.seconds:,.0f} seconds of computing."]
    if state.loss is not None:
        lines.append(f"The last step's loss was {state.loss:.4f} a token.")
    if state.best_validation_loss is not None and state.first_validation_loss is not None:
        lines.append(
            f"The validation loss was {state.first_validation_loss:.4f} before and is "
            f"{state.best_validation_loss:.4f} after step {result_step:,}, whose adapter this is."
        )
    else:
        lines.append(f"The adapter is that of step {result_step:,}. There was no validation.")
    return " ".join(lines) + "\n"
