"""The model card of an adapter: what it was made from, how, and with which result. Text only; called by run.py, and by
cli/tune.py for what to type next."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freehold.hub.find import DEFAULT
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


_QAT = """\
It was trained on weights in which it was merged and rounded to MXFP4 (QAT): `freehold merge` gives the very model that
was trained. Beside weights that are not merged it acts almost the same.

"""


def model_card(name: str, run: Mapping[str, Any], state: TrainingState, *, result_step: int) -> str:
    """`run` is what run.json says."""
    if run["method"] == "full":
        return _full_card(name, run, state, result_step)
    lora, loop = run["request"]["lora"], run["request"]["loop"]
    of_adapter = adapter_of(run)
    targets = "\n".join(f"| {kind} | {rank} | {alpha:g} |" for kind, rank, alpha in of_adapter["targets"])
    return (
        _HEADER.format(base=run["model"]["name"])
        + f"\n# {name}\n\n"
        + f"A LoRA adapter for `{run['model']['name']}`, made by Freehold {run['freehold']}. It changes nothing of the "
        "model's weights, and is read by Freehold and by PEFT.\n\n"
        f"```\n{chat_command('<this folder>', run['model']['name'])}\n```\n\n"
        + _data(run, "pairs" if run["method"] == "dpo" else "examples")
        + "## Training\n\n| target | rank | alpha |\n|---|---|---|\n"
        + targets
        + f"\n\nrsLoRA: {'yes' if of_adapter['rslora'] else 'no'}; dropout {lora['dropout']:g}; "
        + f"balance {lora['balance']:g}; "
        + _method(run["request"])
        + f"{run['how']}\n\n"
        + (_began_with(run["adapter"]) if "adapter" in run else "")
        + (_QAT if lora["qat"] else "")
        + _options(loop)
        + "\n\n## Result\n\n"
        + _result(state, result_step, "pair" if run["method"] == "dpo" else "token")
    )


def chat_command(adapter: Path | str, model: str) -> str:
    """What one types to talk to an adapter. The command line says it too, when a run is done."""
    return f"freehold chat --adapter {adapter}" + ("" if model == DEFAULT else f" --model {model}")


def adapter_of(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where run.json says what the adapter is: its `targets`, and `rslora`. They are those of the one that it began
    with, if there was one."""
    found: Mapping[str, Any] = run.get("adapter") or run["request"]["lora"]
    return found


def _began_with(adapter: Mapping[str, Any]) -> str:
    tensors = adapter["files"][-1]
    return (
        f"It went on from the adapter `{adapter['name']}` ({tensors['bytes']:,} bytes, SHA-256 `{tensors['sha256']}`), "
        "which had its targets and ranks.\n\n"
    )


def _full_card(name: str, run: Mapping[str, Any], state: TrainingState, result_step: int) -> str:
    header = _HEADER.replace("library_name: peft\n", "").replace("lora, ", "")
    request = run["request"]
    return (
        header.format(base=run["model"]["name"])
        + f"\n# {name}\n\n"
        + f"`{run['model']['name']}` tuned by Freehold {run['freehold']}: {run['parameters']:,} parameters learnt. "
        "They were computed with as they are stored here (QAT).\n\n"
        "```\nfreehold chat --model <this folder>/model\n```\n\n"
        + _data(run, "examples")
        + "## Training\n\n"
        + f"Trained: {', '.join(request['full']['train'])}; balance {request['full']['balance']:g}; {run['how']}\n\n"
        + _options(request["loop"])
        + "\n\n## Result\n\n"
        + _result(state, result_step, "token")
    )


def _data(run: Mapping[str, Any], what: str) -> str:
    data = run["data"]
    files = "\n".join(f"| `{file['name']}` | {file['bytes']:,} | `{file['sha256']}` |" for file in data["files"])
    return (
        "## Data\n\n| file | bytes | SHA-256 |\n|---|---|---|\n"
        + files
        + f"\n\n{data['examples']:,} {what}, {data['tokens']:,} tokens, of which {data['targets']:,} are learnt"
        + f"; {data['validation_examples']:,} {what} ({data['validation_targets']:,} tokens) are for validation. "
        + f"Lines cut to {run['request']['loop']['max_length']:,} tokens: {data['truncated']:,}; "
        + f"left out for that: {data['left_out']:,}.\n\n"
        "Say here where they come from, and what they may be used for.\n\n"
    )


def _options(loop: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in loop.items() if value is not None)


def _method(request: Mapping[str, Any]) -> str:
    if request["method"] != "dpo":
        return ""
    beta, smoothing = request["dpo"]["beta"], request["dpo"]["label_smoothing"]
    return f"DPO on preference pairs with beta {beta:g} and label smoothing {smoothing:g}; "


def _result(state: TrainingState, result_step: int, unit: str) -> str:
    lines = [f"{state.step:,} steps over {state.tokens:,} tokens in {state.seconds:,.0f} seconds of computing."]
    if state.loss is not None:
        lines.append(f"The last step's loss was {state.loss:.4f} a {unit}.")
    if state.best_validation_loss is not None and state.first_validation_loss is not None:
        lines.append(
            f"The validation loss was {state.first_validation_loss:.4f} before and is "
            f"{state.best_validation_loss:.4f} after step {result_step:,}, whose weights these are."
        )
        if state.best_validation_loss > state.first_validation_loss:
            lines.append("It has **risen**: what there was before is better by this measure.")
    else:
        lines.append(f"The weights are those of step {result_step:,}. There was no validation.")
    return " ".join(lines) + "\n"
