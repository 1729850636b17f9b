"""How fast the Harmony parser reads, in tokens a second on one core.

    python bench/harmony.py [--rounds 7]

Turns of reasoning, a call and an answer are fed token by token, with all events made. openai-harmony's StreamableParser
reads the same beside it. Then an answer alone, of characters that are split over several tokens. The median of the
rounds.
"""

import argparse
import gzip
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import openai_harmony

from freehold.formats.conversation import Tool
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.parser import HarmonyParser
from freehold.formats.tokenizer import Tokenizer

_OFFER = Offer(functions=(Tool(name="get_weather", parameters={"type": "object"}),))
_REASONING = "The user asks about the weather in Tokyo, so a tool is needed; naïve guesses would be wrong 😀. " * 20
_ARGUMENTS = '{"city": "東京", "days": [1, 2, 3], "units": "celsius"}'
_ANSWER = "It is **sunny** in Tokyo today, 21 °C, and a light breeze comes from the sea.\n\n- Morning: clear\n" * 20
_TURN = (
    f"<|channel|>analysis<|message|>{_REASONING}<|end|>"
    f"<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{_ARGUMENTS}<|call|>"
    f"<|start|>assistant<|channel|>final<|message|>{_ANSWER}<|return|>"
)
_SPLIT = f"<|channel|>final<|message|>{'𰻞🫨🧌🪿🫏 ' * 100}<|return|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds: int = parser.parse_args().rounds
    tokenizer = Tokenizer.o200k_harmony()
    ids = tokenizer.encode_with_control(_TURN) * 20
    _report("freehold", ids, lambda: _ours(tokenizer, ids), rounds)
    encoding, some = _oracle(), ids[: len(ids) // 20]
    _report("openai-harmony", some, lambda: _theirs(encoding, some), rounds)
    split = tokenizer.encode_with_control(_SPLIT)
    _report("freehold, split characters", split, lambda: _ours(tokenizer, split), rounds)


def _ours(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    parser = HarmonyParser(tokenizer, offer=_OFFER)
    for id_ in ids:
        parser.feed(id_)
    parser.flush()


def _theirs(encoding: Any, ids: Sequence[int]) -> None:
    parser = openai_harmony.StreamableParser(encoding, role=openai_harmony.Role.ASSISTANT)
    for id_ in ids:
        parser.process(id_)
        _ = parser.last_content_delta


def _oracle() -> Any:
    """openai-harmony's encoding, of the vocabulary in this package: it would fetch its own."""
    packed = resources.files("freehold.formats").joinpath("data", "o200k_base.tiktoken.gz").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "o200k_base.tiktoken").write_bytes(gzip.decompress(packed))
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
        return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def _report(name: str, ids: Sequence[int], run: Callable[[], None], rounds: int) -> None:
    run()
    speeds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        speeds.append(len(ids) / (time.perf_counter() - start))
    sys.stdout.write(f"{name}: {statistics.median(speeds):,.0f} tokens/s, {len(ids):,} tokens, {rounds} rounds\n")


if __name__ == "__main__":
    main()
