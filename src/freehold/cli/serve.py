"""`freehold serve`: a model behind the APIs that clients know."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import (
    Browse,
    Context,
    Dense,
    Device,
    Dtype,
    KvDtype,
    McpConfig,
    McpServers,
    ModelOption,
    PrefixCacheDir,
    PythonLimit,
    Search,
    StoreOption,
    Threads,
    ToolFiles,
)
from freehold.errors import UsageError
from freehold.serve.settings import ServeSettings

if TYPE_CHECKING:
    from freehold.session.served import Served

_DEFAULTS = ServeSettings()


def command(
    model: ModelOption = "default",
    host: Annotated[str, typer.Option(help="Listen on this address.")] = _DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Listen on this port; 0 takes a free one.")] = _DEFAULTS.port,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Another name that the model answers to; may be given again.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A LoRA adapter in PEFT's format, for who asks for the model `default:NAME`; may be given again.",
        ),
    ] = None,
    script: Annotated[
        Path | None, typer.Option(help="No model: say what this JSONL file says, for who writes a client.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="How fast a script is said. Default: as fast as it goes.")
    ] = None,
    browse: Browse = None,
    search: Search = None,
    python: Annotated[bool, typer.Option("--python", help="Python in a sandbox without network.")] = False,
    python_limit: PythonLimit = None,
    tools: ToolFiles = None,
    mcp: McpServers = None,
    mcp_config: McpConfig = None,
    harmony: Annotated[
        bool | None,
        typer.Option(help="Speak Harmony, or the model's template. Default: what the model was made for."),
    ] = None,
    store: StoreOption = None,
    keep_days: Annotated[
        float | None, typer.Option(help="Forget stored responses after so many days; 0 keeps them.", show_default="30")
    ] = None,
    keep_bytes: Annotated[
        int | None, typer.Option(help="Forget the oldest beyond so many bytes; 0 keeps them.", show_default="4 GiB")
    ] = None,
    tuning: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Let clients upload files and fine-tune this model; both lie in this folder."),
    ] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Serve other machines although there is no key.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name under which clients reach this machine; may be given again.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may use this server; may be given again.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate in PEM: serve over TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, where that is another file.")] = None,
    airgap: Annotated[
        bool, typer.Option("--airgap", help="Let neither this process nor its children open any connection.")
    ] = False,
    container_timeout: Annotated[
        float, typer.Option(help="Seconds that a conversation's kernel and pages are kept without being used.")
    ] = _DEFAULTS.container_timeout,
    max_containers: Annotated[
        int,
        typer.Option(help="So many conversations' kernels and pages are kept; idle ones of whoever has the most go."),
    ] = _DEFAULTS.max_containers,
    max_concurrency: Annotated[int, typer.Option(help="So many answers are written at once.")] = _DEFAULTS.max_running,
    max_queue: Annotated[
        int, typer.Option(help="So many more may wait; who comes then is sent away.")
    ] = _DEFAULTS.max_queue,
    max_body_bytes: Annotated[
        int, typer.Option(help="The largest request.", show_default="32 MiB")
    ] = _DEFAULTS.max_body_bytes,
    max_upload_bytes: Annotated[
        int, typer.Option(help="The largest upload, with --tuning.", show_default="512 MiB")
    ] = _DEFAULTS.max_upload_bytes,
    max_files_bytes: Annotated[
        int, typer.Option(help="All files of a key together.", show_default="8 GiB")
    ] = _DEFAULTS.max_files_bytes,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that an answer may take.")
    ] = _DEFAULTS.request_timeout,
    receive_timeout: Annotated[
        float, typer.Option(help="Seconds that a request's body may take to come.")
    ] = _DEFAULTS.receive_timeout,
    send_timeout: Annotated[
        float, typer.Option(help="Seconds that a client may stop reading.")
    ] = _DEFAULTS.send_timeout,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that answers have to end on SIGTERM.")
    ] = _DEFAULTS.drain_timeout,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
    log_content: Annotated[bool, typer.Option("--log-content", help="Log what is asked and answered, too.")] = False,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Tokens that all conversations together have room for. Default: one context.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    dense: Dense = None,
    kv_dtype: KvDtype = None,
    context: Context = None,
    threads: Threads = None,
    prefix_cache_dir: PrefixCacheDir = None,
) -> None:
    """Serve a model to clients of OpenAI's and Anthropic's APIs.

    \b
    freehold serve
    freehold serve --model /data/gpt-oss-20b --port 8080
    freehold serve --model /data/gpt-oss-20b --browse ~/notes --python
    freehold serve --tuning /data/tuning
    freehold serve --adapter poet=runs/poet --adapter clerk=runs/clerk
    freehold serve --script turns.jsonl --tokens-per-second 50
    """
    if script is None and tokens_per_second is not None:
        raise UsageError("--tokens-per-second is for a --script; a model is as fast as it is")
    if script is not None:
        of_models = {
            "--model": model if model != "default" else None,
            "--adapter": adapter,
            "--harmony": harmony,
            "--kv-tokens": kv_tokens,
            "--device": device,
            "--dtype": dtype,
            "--dense": dense,
            "--kv-dtype": kv_dtype,
            "--context": context,
            "--threads": threads,
            "--prefix-cache-dir": prefix_cache_dir,
        }
        if given := [option for option, value in of_models.items() if value is not None]:
            raise UsageError(f"a --script is no model, and takes nothing of one: leave {', '.join(given)} out")
    adapters = _adapters(adapter or ())
    from freehold.serve.journal import start_logging
    from freehold.serve.start import start
    from freehold.tools.kit import ToolChoices

    settings = dataclasses.replace(
        _DEFAULTS,
        host=host,
        port=port,
        model_names=tuple(served_model_name or ()),
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        allow_no_key=allow_no_key,
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_running=max_concurrency,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        max_upload_bytes=max_upload_bytes,
        max_files_bytes=max_files_bytes,
        request_timeout=request_timeout,
        receive_timeout=receive_timeout,
        send_timeout=send_timeout,
        drain_timeout=drain_timeout,
        container_timeout=container_timeout,
        max_containers=max_containers,
        keep_days=_DEFAULTS.keep_days if keep_days is None else keep_days or None,
        keep_bytes=_DEFAULTS.keep_bytes if keep_bytes is None else keep_bytes or None,
        log_json=log_json,
        log_content=log_content,
    )

    choices = ToolChoices(
        browse=tuple(browse or ()),
        search=search,
        python=python or bool(python_limit),
        python_limits=tuple(python_limit or ()),
        functions=tuple(tools or ()),
        mcp=tuple(mcp or ()),
        mcp_config=tuple(mcp_config or ()),
    )
    if harmony is None and not choices.is_empty:
        harmony = True  # only Harmony has words for all tools

    def load() -> "Served":
        if script is not None:
            from freehold.session.scripted import read_script, serve_script

            return serve_script(read_script(script), tokens_per_second=tokens_per_second)
        from freehold.session import model as models
        from freehold.session.served import serve_model

        with terminal.progress_bars() as progress:
            loaded = models.load(
                model,
                device=device,
                dtype=dtype,
                dense=dense,
                kv_dtype=kv_dtype,
                context=context,
                kv_tokens=kv_tokens,
                max_num_seqs=max_concurrency,
                threads=threads,
                prefix_cache_dir=prefix_cache_dir,
                adapters=adapters,
                progress=progress,
            )
        return serve_model(loaded, name=Path(model).name or model, harmony=harmony)

    trainer = None
    if tuning is not None and script is None:
        from freehold.serve.tuning.trainer import Trainer
        from freehold.train.options import LEARNING_RATES, LoopOptions

        of_both = {"--device": device, "--dtype": dtype, "--dense": dense, "--threads": threads}
        options = [text for option, value in of_both.items() if value is not None for text in (option, str(value))]
        if harmony is not None:
            options.append("--harmony" if harmony else "--no-harmony")
        trainer = Trainer(
            model=model,
            learning_rates={"supervised": LEARNING_RATES["lora"], "dpo": LEARNING_RATES["dpo"]},
            max_length=LoopOptions().max_length,
            options=tuple(options),
        )

    start_logging(as_json=log_json)
    bars = terminal.progress_bars
    sys.exit(
        start(
            load,
            settings,
            store_url=store,
            no_network=airgap,
            tools=choices,
            tuning=tuning,
            trainer=trainer,
            progress=bars,
        )
    )


def _adapters(given: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name.strip() or not folder:
            raise UsageError(f"--adapter takes NAME=DIR, the name that clients ask for and the folder; got {text!r}")
        if ":" in name:  # what comes after the last one is the adapter: nobody could ask for this one
            raise UsageError(f"clients ask for MODEL:NAME, so that no colon can be in --adapter's name, as in {name!r}")
        if name in folders:
            raise UsageError(f"--adapter {name} is given twice; give each a name of its own")
        folders[name] = Path(folder)
    return folders
