"""What indexing a folder of documents costs.

    python bench/browser.py [--gb 2] [--folder FOLDER] [--keep]

Generates a folder of Markdown, text, HTML and program code (files of 1 KB to 16 MB, words by Zipf's law, a vocabulary
of 200,000), and tells the time and peak memory of a first index, of a look at an unchanged folder, and of an edit of
one file until a search finds it; then the time of searches. Each in a process of its own. The folder is removed.
"""

import argparse
import asyncio
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path

from freehold.log import Progress
from freehold.tools.browser.documents import Documents

_VOCABULARY = 200_000
_LETTERS = "etaoinshrdlucmfwypvbgk"


def generate(folder: Path, total: int, seed: int) -> int:
    """Files until there are `total` bytes of them; returns how many."""
    source = random.Random(seed)
    words = ["".join(source.choices(_LETTERS, k=source.randint(2, 11))) for _ in range(_VOCABULARY)]
    weights = list(accumulate(1 / (rank + 10) for rank in range(_VOCABULARY)))
    paragraphs = [" ".join(source.choices(words, cum_weights=weights, k=80)) for _ in range(20_000)]
    written = number = 0
    while written < total:
        size = int(min(10 ** source.uniform(3, 5.5), 300_000)) if number % 1000 else 15_000_000
        text = []
        while size > 0:
            text.append(source.choice(paragraphs) + f" {source.choice(words)}{number}.")
            size -= len(text[-1])
        path = folder / f"part{number // 500:03}" / f"document{number:06}.{('md', 'txt', 'html', 'py')[number % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            body = "".join(f"<p>{paragraph} <a href='document{number - 1:06}.py'>next</a></p>" for paragraph in text)
            written += path.write_text(f"<html><head><title>Page {number}</title></head><body>{body}</body></html>")
        else:
            written += path.write_text(f"# Document {number}\n\n" + "\n\n".join(text))
        number += 1
    return number


def bar() -> Progress:
    shown = [0.0]

    def progress(label: str, done: int, total: int) -> None:
        if sys.stderr.isatty() and (time.monotonic() - shown[0] > 1 or done == total):
            shown[0] = time.monotonic()
            sys.stderr.write(f"\r{label}: {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")

    return progress


def measure(work: str, folder: Path, index: Path) -> dict[str, float]:
    """One piece of work in this process."""
    documents = Documents(folder, index)
    begin, busy = time.perf_counter(), time.process_time()
    if work == "edit":
        edited = sorted(folder.rglob("*.md"))[7]
        edited.write_text(edited.read_text() + f"\n\nquixotic zeppelin {index.stat().st_mtime_ns}\n")
        begin, busy = time.perf_counter(), time.process_time()
        hits = asyncio.run(documents.search("quixotic zeppelin", 3))
        assert hits[0].url == edited.resolve().as_uri(), hits
    elif work == "search":
        words = [line.split()[3] for line in sorted(folder.rglob("*.txt"))[3].read_text().split("\n\n")[1:30]]
        documents.refresh()
        times = []
        for first, second in pairwise(words):
            start = time.perf_counter()
            asyncio.run(documents.search(f"{first} {second}", 10))
            times.append(time.perf_counter() - start)
        return {"median_s": statistics.median(times), "worst_s": max(times)}
    else:
        documents.refresh(progress=bar())
    taken, busy = time.perf_counter() - begin, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": taken, "cpu_seconds": busy, "peak_MiB": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path("browser-bench"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="Leave the folder and its index.")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    documents, index = args.folder / "documents", args.folder / "index"
    if args.work:
        sys.stdout.write(json.dumps(measure(args.work, documents, index)))
        return 0
    try:
        number = generate(documents, int(args.gb * 1e9), args.seed)
        sys.stdout.write(f"{number:,} files, {args.gb:g} GB\n")
        for work in ("first", "unchanged", "edit", "edit", "edit", "unchanged", "search"):
            command = [sys.executable, __file__, "--folder", str(args.folder), "--work", work]
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            sys.stdout.write(f"{work}: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()) + "\n")
            sys.stdout.flush()
        size = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
        sys.stdout.write(f"index: {size / 1e6:,.0f} MB\n")
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
