"""Options that several commands share, each written once. Values are checked where they are used, not here."""

from pathlib import Path
from typing import Annotated

import typer

from freehold.config import DenseFormat, ExpertFormat, Layout

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="A model folder, a name in a cache, or 'default'.", show_default=True),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a name in a cache, or 'default'.")]
Destination = Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder; it appears when it is complete.")]
DestinationArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DESTINATION",
        help="A new folder, or a new file that ends in .gguf; it appears when it is complete.",
    ),
]
LayoutOption = Annotated[
    Layout | None,
    typer.Option("--layout", help="A folder's layout: Hugging Face's names, or OpenAI's original ones. Default: hf."),
]
ExpertsOption = Annotated[
    ExpertFormat | None, typer.Option("--experts", help="How experts are stored. Default: as they are.")
]
DenseOption = Annotated[
    DenseFormat | None,
    typer.Option(
        "--dense", help="How a .gguf stores all large matrices that are not MXFP4, bf16 experts too. Default: q8."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="sqlite:////folder/file.db or postgresql://user@host/name. Default: freehold.db in the data directory.",
    ),
]

ADAPTER = "adapter"
"""What the one adapter of a command goes by."""
AdapterDir = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="Answer with this LoRA adapter: a folder in PEFT's format."),
]

ReasoningEffort = Annotated[
    str | None,
    typer.Option(help="low, medium or high; for models that speak Harmony.", metavar="EFFORT"),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 takes the likeliest token. Default: the model's own."),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest tokens that together reach this probability."),
]
TopK = Annotated[int | None, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens less likely than this share of the likeliest."),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Stop after this many new tokens. Default: the model's own, or its context."),
]
Device = Annotated[
    str | None,
    typer.Option(help="A torch device such as cpu or cuda. Default: the GPU if there is one."),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16, for reference ops (GPU). Default: by device and memory."),
]
Dense = Annotated[
    str | None,
    typer.Option(help="How native CPU kernels hold dense weights: q8, bf16 or f32. Default: q8."),
]
KvDtype = Annotated[
    str | None,
    typer.Option(help="The KV cache's type: f32, bf16 or q8. Default: bf16 with native kernels."),
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens a conversation may have. Default: the model's context, or what fits into memory."),
]
PrefixCacheDir = Annotated[
    Path | None,
    typer.Option(
        help="A folder in which the beginnings of prompts are kept, computed, for the next time: system prompts, tools."
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU kernels. Default: one for each physical core.")]

ToolFiles = Annotated[
    list[Path] | None,
    typer.Option("--tools", metavar="FILE", help="A Python file of functions. May be given again."),
]
Browse = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="A folder or ZIM file to search and read. May be given again."),
]
PythonLimit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="What Python may take, such as seconds=300 or memory_bytes=4GiB. May be given again.",
    ),
]
Search = Annotated[
    str | None,
    typer.Option(
        metavar="exa|you|URL",
        help="Search the web, by Exa or You.com (keys in EXA_API_KEY, YDC_API_KEY) or a SearXNG server.",
    ),
]
McpServers = Annotated[
    list[str] | None,
    typer.Option("--mcp", metavar="SERVER", help="An MCP server's tools: its command or URL. May be given again."),
]
McpConfig = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="MCP servers of a file such as mcp.json. May be given again."),
]
