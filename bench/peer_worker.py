"""One contestant of bench/peers.py: loads one model, then times what it is asked to, one JSON line per request.

    python bench/peer_worker.py ENGINE MODEL [--threads 2] [--context 4096] [--set FIELD=VALUE]

ENGINE is freehold, llama_cpp or ik_llama_cpp: the package that this interpreter must have. Nothing else but the
standard library is imported, so a peer's virtual environment need not hold Freehold. Everything runs on the CPU.

    (once loaded)                               {"engine": …, "version": …, "load_seconds": …, "vocabulary": …, …}
    {"do": "prefill", "tokens": 512}            {"seconds": …, "peak_rss_bytes": …, "private_bytes": …}
    {"do": "decode", "tokens": 32, "depth": 0}  the same
    {"do": "check", "tokens": 256}              {"logits": [256 of those after such a prompt], …}

A prefill starts from an empty cache, runs 512 tokens at a time, and computes the logits of each chunk's last token. A
decode starts from a cache filled to `depth`, untimed, and feeds one token at a time, each with its logits. Nothing is
sampled: the tokens are drawn beforehand, and the same requests draw the same ones in every worker. The process ends
with its input.
"""

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

CHUNK = 512  # tokens of a prompt that run together, in every engine
_CHECKED_LOGITS = 256
_PACKAGES = {"freehold": "freehold", "llama_cpp": "llama-cpp-python", "ik_llama_cpp": "ik-llama-cpp-python"}
_BEST: dict[str, dict[str, int | str]] = {
    # Off as in its own programs: the library's default keeps every position of windowed layers, and looks at them all.
    "llama_cpp": {"swa_full": 0},
    "ik_llama_cpp": {"repack_tensors": 1},
}


class WorkerError(Exception):
    """The model cannot be loaded or run; the message says why."""


class Cache(Protocol):
    """One sequence's keys and values."""

    def clear(self) -> None: ...

    def feed(self, tokens: Sequence[int]) -> None:
        """Run at most CHUNK more tokens, and compute the logits of the last one."""

    def logits(self, ids: Sequence[int]) -> list[float]:
        """Some of the logits that the last `feed` computed."""


class Engine(Protocol):
    vocabulary: int
    details: str

    def new_cache(self, capacity: int) -> Cache: ...


class FreeholdCache:
    """A step of the model without sampling: what the engine does for one sequence."""

    def __init__(self, transformer: Any, capacity: int) -> None:
        self._torch = importlib.import_module("torch")
        self._transformer = transformer
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        self._cache = self._transformer.new_cache(self._capacity)

    def feed(self, tokens: Sequence[int]) -> None:
        with self._torch.inference_mode():
            hidden_TD = self._transformer.run(self._torch.tensor(tokens), self._cache)
            self._logits_V = self._transformer.unembed(hidden_TD[-1:])[0]

    def logits(self, ids: Sequence[int]) -> list[float]:
        return [float(self._logits_V[i]) for i in ids]


class Freehold:
    """`settings` are keyword arguments of freehold.load, such as dense=bf16."""

    def __init__(self, path: Path, threads: int, context: int, settings: dict[str, str]) -> None:
        freehold = importlib.import_module("freehold")
        model = freehold.load(path, device="cpu", threads=threads, context=context, **settings)
        self._transformer = model.transformer
        self.vocabulary: int = model.config.vocab_size
        self.details: str = model.policy.describe(model.experts)

    def new_cache(self, capacity: int) -> FreeholdCache:
        return FreeholdCache(self._transformer, capacity)


class LlamaCache:
    """A llama_context: it belongs to this process until the end, as does the model under it."""

    def __init__(self, api: Any, model: Any, params: Any, capacity: int) -> None:
        self._api = api
        params.n_ctx = -(-capacity // 256) * 256
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise WorkerError(f"no context of {params.n_ctx} tokens can be made; the log above says why")
        self._batch = api.llama_batch_init(CHUNK, 0, 1)
        self.length = 0

    def clear(self) -> None:
        self.length = 0
        if hasattr(self._api, "llama_memory_clear"):
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        else:
            self._api.llama_kv_cache_clear(self._context)

    def feed(self, tokens: Sequence[int]) -> None:
        batch, last = self._batch, len(tokens) - 1
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == last
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise WorkerError(f"llama_decode returned {code} for {len(tokens)} tokens at position {self.length}")
        self._logits = self._api.llama_get_logits_ith(self._context, last)  # waits for the result
        self.length += len(tokens)

    def logits(self, ids: Sequence[int]) -> list[float]:
        return [self._logits[i] for i in ids]


class Llama:
    """llama.cpp and its fork ik_llama.cpp: the same C functions, in struct layouts that only their packages know.

    `settings` are fields of llama_model_params and llama_context_params, such as repack_tensors=1.
    """

    _MODULES: ClassVar = {"llama_cpp": "llama_cpp.llama_cpp", "ik_llama_cpp": "ik_llama_cpp._ctypes_api"}

    def __init__(self, package: str, path: Path, threads: int, settings: dict[str, str]) -> None:
        self._api = api = importlib.import_module(self._MODULES[package])
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        self._params = api.llama_context_default_params()
        ours: dict[str, int | str] = {"n_gpu_layers": 0, "n_batch": CHUNK, "n_ubatch": CHUNK, "n_threads": threads}
        ours["n_threads_batch"] = threads
        for field, value in (ours | _BEST[package] | settings).items():
            owners = [params for params in (model_params, self._params) if hasattr(params, field)]
            if not owners and field in settings:  # of ours, older versions lack some
                raise WorkerError(f"neither llama_model_params nor llama_context_params has a field {field!r}")
            for params in owners:
                setattr(params, field, type(getattr(params, field))(float(value)))
        self._model = api.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise WorkerError(f"{path} cannot be loaded; the log above says why")
        self.vocabulary: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        # The fork's package leaves this function out, but not its library.
        info = getattr(api, "llama_print_system_info", None) or api._lib.llama_print_system_info
        info.restype = ctypes.c_char_p
        self.details = " ".join(re.findall(r"(\w+) = 1", info().decode()))

    def new_cache(self, capacity: int) -> LlamaCache:
        return LlamaCache(self._api, self._model, self._params, capacity)


def load(engine: str, path: Path, threads: int, context: int, settings: dict[str, str]) -> Engine:
    if engine == "freehold":
        return Freehold(path, threads, context, settings)
    return Llama(engine, path, threads, settings)


class Worker:
    """Answers requests with one cache, made beforehand, so that no timing includes making one."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._vocabulary = engine.vocabulary
        self._random = random.Random(0)
        self._cache = engine.new_cache(capacity)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self._cache.clear()
        if request["do"] == "prefill":
            return {"seconds": self._timed(self._chunks(request["tokens"], CHUNK))}
        if request["do"] == "decode":
            self._timed(self._chunks(request["depth"], CHUNK))
            return {"seconds": self._timed(self._chunks(request["tokens"], 1))}
        if request["do"] == "check":
            self._timed(self._chunks(request["tokens"], CHUNK))
            return {"logits": self._cache.logits(self._tokens(_CHECKED_LOGITS))}
        raise WorkerError(f"unknown request {request}")

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(count)]

    def _chunks(self, count: int, size: int) -> list[list[int]]:
        tokens = self._tokens(count)
        return [tokens[start : start + size] for start in range(0, count, size)]

    def _timed(self, chunks: list[list[int]]) -> float:
        start = time.perf_counter()
        for chunk in chunks:
            self._cache.feed(chunk)
        return time.perf_counter() - start


def memory() -> dict[str, int]:
    """Peak resident bytes, mapped files included, and the bytes that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon")}
    return {"peak_rss_bytes": kib["VmHWM"] * 1024, "private_bytes": kib["RssAnon"] * 1024}


def private_stdout() -> TextIO:
    """The stdout of now for replies alone; whatever a native library prints goes to stderr from here on."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=_PACKAGES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096, help="positions that a request may need at most")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="see Freehold and Llama")
    arguments = parser.parse_args()
    replies = private_stdout()
    try:
        start = time.perf_counter()
        settings = dict(item.split("=", 1) for item in arguments.set)
        engine = load(arguments.engine, arguments.model, arguments.threads, arguments.context, settings)
        worker = Worker(engine, arguments.context)
        ready = {
            "engine": arguments.engine,
            "version": importlib.metadata.version(_PACKAGES[arguments.engine]),
            "load_seconds": time.perf_counter() - start,
            "vocabulary": engine.vocabulary,
            "details": engine.details,
        }
        replies.write(json.dumps(ready | memory()) + "\n")
        for line in sys.stdin:
            replies.write(json.dumps(worker.answer(json.loads(line)) | memory()) + "\n")
    except (WorkerError, ImportError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
