"""What number formats cost, ours and llama.cpp's, on the same text: KL from the float32 reference, and perplexity.

    python bench/quality.py --model FOLDER --gguf FILE [--python PYTHON] [--tokens 256 4096]

FILE is the same model as GGUF (`freehold convert FOLDER FILE --dense q8`); PYTHON an interpreter that has
llama-cpp-python, by default this one. The text is that of `freehold receipt`, whose rows for the native kernels this
repeats. llama.cpp runs in a process of its own, which writes its logits to a temporary file.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

_CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--dense", default="q8")
    parser.add_argument("--worker", nargs=2, metavar=("TOKENS", "LOGITS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _llama_logits(arguments.gguf, *map(Path, arguments.worker))
    else:
        _compare(arguments.model, arguments.gguf, arguments.python, sorted(arguments.tokens), arguments.dense)


def _compare(model: str, gguf: Path, python: str, lengths: list[int], dense: str) -> None:
    import numpy as np
    import torch
    import torch.nn.functional as F

    import freehold
    from freehold.kernels import backends
    from freehold.model.transformer import Transformer
    from freehold.session import receipt
    from freehold.weights.layouts import open_checkpoint

    native = freehold.load(model, device="cpu", dense=dense)
    assert native.tokenizer is not None
    token_ids = native.tokenizer.encode(receipt.text())[: lengths[-1] + 1]
    if len(token_ids) <= lengths[-1]:
        sys.exit(f"quality.py: the text has {len(token_ids) - 1} tokens to compare, not {lengths[-1]}")
    checkpoint = open_checkpoint(native.path)
    reference = Transformer(
        checkpoint.config, checkpoint.table(), dtype=torch.float32, device=torch.device("cpu"), kv_type="f32"
    )
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        given, taken = Path(temporary, "tokens.json"), Path(temporary, "logits.npy")
        given.write_text(json.dumps(token_ids[:-1]))
        command = [python, __file__, "--model", model, "--gguf", str(gguf), "--worker", str(given), str(taken)]
        subprocess.run(command, check=True)
        theirs_TV = torch.from_numpy(np.load(taken, mmap_mode="c"))
        tokens_T = torch.tensor(token_ids)
        caches = reference.new_cache(), native.transformer.new_cache()
        rows: list[torch.Tensor] = []  # one of a token: KL, agreement and loss of each, and the reference's loss
        for start in range(0, lengths[-1], 128):
            stop = min(start + 128, lengths[-1])
            piece, following = tokens_T[start:stop], tokens_T[start + 1 : stop + 1].unsqueeze(-1)
            with backends.reference_only():
                expected_TV = F.log_softmax(reference.unembed(reference.run(piece, caches[0])), dim=-1)
            ours_TV = native.transformer.unembed(native.transformer.run(piece, caches[1]))
            columns = [-expected_TV.gather(-1, following).squeeze(-1)]
            for got in (ours_TV, theirs_TV[start:stop]):
                got_TV = F.log_softmax(got, dim=-1)
                columns.append((expected_TV.exp() * (expected_TV - got_TV)).sum(-1))
                columns.append((expected_TV.argmax(-1) == got_TV.argmax(-1)).float())
                columns.append(-got_TV.gather(-1, following).squeeze(-1))
            rows.append(torch.stack(columns, dim=-1).double())
    table_TC = torch.cat(rows)
    sys.stdout.write("| tokens | | mean KL | same top-1 | perplexity |\n|---|---|---|---|---|\n")
    for length in lengths:
        means = table_TC[:length].mean(0).tolist()
        sys.stdout.write(f"| {length} | float32 reference | | | {math.exp(means[0]):.3f} |\n")
        for name, first in (("freehold", 1), ("llama.cpp", 4)):
            kl, same, loss = means[first : first + 3]
            sys.stdout.write(f"| {length} | {name} | {kl:.5f} | {same:.2%} | {math.exp(loss):.3f} |\n")


def _llama_logits(gguf: Path, tokens: Path, logits: Path) -> None:
    import numpy as np
    from llama_cpp import Llama

    token_ids = json.loads(tokens.read_text())
    model = Llama(str(gguf), n_ctx=len(token_ids), n_batch=_CHUNK, logits_all=True, verbose=False)
    model.eval(token_ids)
    np.save(logits, np.asarray(model.scores[: len(token_ids)], dtype=np.float32))


if __name__ == "__main__":
    main()
