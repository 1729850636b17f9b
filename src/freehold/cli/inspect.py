"""`freehold inspect`: what a model is made of, and what it will need."""

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import terminal
from freehold.cli.options import Dense, Device, Dtype, Json, KvDtype, ModelArgument, Threads

if TYPE_CHECKING:
    from freehold.config import ModelConfig
    from freehold.session.policy import Policy
    from freehold.weights.layouts import Checkpoint


def command(
    model: ModelArgument,
    context: Annotated[
        int | None, typer.Option(help="Tokens to plan memory for. Default: the model's context.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    dense: Dense = None,
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show a model's architecture, parameters, tensors, size on disk, number formats and memory need. Loads no weights.

    \b
    freehold inspect default
    freehold inspect default --context 4096 --kv-dtype q8 --json
    """
    from freehold.hub.find import find_model
    from freehold.session.memory import check_context
    from freehold.session.policy import decide
    from freehold.weights.layouts import open_checkpoint

    with terminal.progress_bars() as progress:
        checkpoint = open_checkpoint(find_model(model, progress))
    config = checkpoint.config
    check_context(config, context)
    policy = decide(config, device=device, dtype=dtype, dense=dense, kv_dtype=kv_dtype, threads=threads)
    facts = _facts(checkpoint, policy, config.max_context if context is None else context)
    terminal.write(json.dumps(facts, indent=2) + "\n" if as_json else _text(facts))


def _facts(checkpoint: "Checkpoint", policy: "Policy", context: int) -> dict[str, Any]:
    from freehold.engine.options import EngineOptions
    from freehold.session.memory import free_memory, plan_memory

    config = checkpoint.config
    plan = plan_memory(config, checkpoint.experts, policy, EngineOptions(context=context))
    return {
        "path": str(checkpoint.folder),
        "layout": checkpoint.layout.value,
        "experts": checkpoint.experts.value,
        "architecture": _architecture(config),
        "parameters": {"total": config.num_parameters, "active": config.num_active_parameters},
        "bytes_on_disk": checkpoint.files.num_bytes,
        "runs": {
            "device": str(policy.device),
            "native": policy.native,
            "activations": str(policy.dtype).removeprefix("torch."),
            "dense": policy.dense,
            "kv_cache": policy.kv,
            "threads": policy.threads,
            "policy": policy.describe(checkpoint.experts.value),
        },
        "memory": {
            "context": context,
            "dense_bytes": plan.dense,
            "experts_bytes": plan.experts,
            "kv_cache_bytes": plan.kv_cache,
            "scratch_bytes": plan.scratch,
            "total_bytes": plan.needed,
            "free_bytes": free_memory(policy),
        },
        "tensors": [
            {"name": name, "dtype": info.dtype_name, "shape": list(info.shape), "bytes": info.num_bytes}
            for name, info in sorted(checkpoint.files.infos.items(), key=lambda item: _natural(item[0]))
        ],
    }


def _architecture(config: "ModelConfig") -> dict[str, Any]:
    windowed = [window for window in config.windows if window is not None]
    return {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
        "active_experts": config.num_active_experts,
        "expert_width": config.expert_width,
        "query_heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_context,
        "windowed_layers": len(windowed),
        "window": windowed[0] if windowed else None,
        "rope_theta": config.rope.theta,
        "yarn_factor": config.rope.factor,
        "tied_embeddings": config.tied_embeddings,
    }


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _text(facts: dict[str, Any]) -> str:
    shape, parameters, memory = facts["architecture"], facts["parameters"], facts["memory"]
    window = f", {shape['windowed_layers']} of them with a window of {shape['window']}" if shape["window"] else ""
    yarn = f", stretched {shape['yarn_factor']:g} times by YaRN" if shape["yarn_factor"] > 1 else ""
    lines = [
        f"{facts['path']}",
        f"  layout       {facts['layout']}, experts in {facts['experts']}",
        f"  layers       {shape['layers']}{window}",
        f"  hidden       {shape['hidden_size']}",
        f"  attention    {shape['query_heads']} query and {shape['kv_heads']} key/value heads of {shape['head_dim']}",
        f"  experts      {shape['experts']} of width {shape['expert_width']}, {shape['active_experts']} active a token",
        f"  vocabulary   {shape['vocabulary']}{', embeddings tied' if shape['tied_embeddings'] else ''}",
        f"  context      {shape['context']} tokens, RoPE theta {shape['rope_theta']:g}{yarn}",
        f"  parameters   {parameters['total']:,} in all, {parameters['active']:,} active per token",
        f"  on disk      {terminal.gib(facts['bytes_on_disk'])}",
        f"  runs         {facts['runs']['policy']}",
        f"  memory       {terminal.gib(memory['total_bytes'])} for {memory['context']} tokens, of "
        f"{terminal.gib(memory['free_bytes'])} free:",
        f"               {terminal.gib(memory['experts_bytes'])} experts + {terminal.gib(memory['dense_bytes'])} dense"
        f" + {terminal.gib(memory['kv_cache_bytes'])} KV cache + {terminal.gib(memory['scratch_bytes'])} scratch",
        "",
        *_tensor_lines(facts["tensors"]),
    ]
    return "\n".join(lines) + "\n"


def _tensor_lines(tensors: list[dict[str, Any]]) -> list[str]:
    """One line for each kind of tensor: layers that differ only in their number are counted together."""
    groups: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for tensor in tensors:
        key = (re.sub(r"\.\d+\.", ".*.", tensor["name"]), tensor["dtype"], tuple(tensor["shape"]))
        groups[key] = groups.get(key, 0) + 1
    width = max(len(name) for name, _, _ in groups)
    return [
        f"  {name:<{width}}  {dtype:<4}  {' × '.join(map(str, shape))}{f'  (× {count})' if count > 1 else ''}"
        for (name, dtype, shape), count in groups.items()
    ]
