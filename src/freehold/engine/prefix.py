"""What earlier requests computed, kept for prompts that begin the same way.

gpt-oss cannot go on from just anywhere: its windowed layers forget what is out of sight. So what is kept are snapshots
at lengths where a later prompt is likely to part or to go on: the ends of messages, which the caller names, the end of
a prompt and of a reply. Snapshots of one conversation share the full layers' pages, and each adds the few of its
window. The least recently used go first when pages are wanted. Found by a digest of all tokens so far, so that a wrong
match would need a collision of 128 bits.
"""

import bisect
import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from freehold.engine.pages import Holding, Pages


class PrefixDigest:
    """The digest of a growing run of tokens."""

    __slots__ = ("_hash", "length")

    def __init__(self, salt: str) -> None:
        self._hash = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16)
        self._hash.update(b"\0")
        self.length = 0

    def of(self, tokens: Sequence[int], length: int) -> bytes:
        """Of the first `length` tokens, which is no fewer than the last time."""
        self._hash.update(array("q", tokens[self.length : length]).tobytes())
        self.length = length
        return self._hash.digest()


@dataclass(slots=True, eq=False)
class Prefix:
    """A snapshot that is kept, under the digest of its tokens.

    `is_root` if it ends the first message that a caller named: what many conversations begin with. `is_private` if only
    its maker's samples share it; `is_volatile` until a request has begun like this that may stand on disk. `uses`
    counts the other requests that went on from it. `is_kept` once it has been written to disk, or could not be.
    """

    key: bytes
    snapshot: Holding
    is_root: bool = False
    is_private: bool = False
    is_volatile: bool = False
    maker: int | None = None  # the request that computed it
    uses: int = 0
    is_kept: bool = False

    @property
    def length(self) -> int:
        return self.snapshot.length

    @property
    def is_wanted_on_disk(self) -> bool:
        may_be = not (self.is_kept or self.is_private or self.is_volatile)
        return may_be and (self.is_root or self.uses > 1)


class PrefixCache:
    """Prefixes by their keys, least recently used first."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()
        self._counts: Counter[int] = Counter()  # of entries, by length
        self._lengths: list[int] = []  # in rising order, each once

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._entries

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._entries.values())

    def find(self, tokens: Sequence[int], most: int, salt: str) -> Prefix | None:
        """The longest one, of at most `most` tokens, that these tokens begin with. It becomes the last to go."""
        digest, best = PrefixDigest(salt), None
        for length in self._lengths:
            if length > most:
                break
            key = digest.of(tokens, length)
            if key in self._entries:
                best = key
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best]

    def put(self, prefix: Prefix) -> None:
        """Keep a prefix; its snapshot is released some day."""
        assert prefix.key not in self._entries
        self._entries[prefix.key] = prefix
        if not self._counts[prefix.length]:
            bisect.insort(self._lengths, prefix.length)
        self._counts[prefix.length] += 1

    def touch(self, key: bytes, *, volatile: bool) -> None:
        self._entries.move_to_end(key)
        self._entries[key].is_volatile &= volatile

    def evict(self) -> bool:
        """Let go of the least recently used one; False where there is none."""
        if not self._entries:
            return False
        _, prefix = self._entries.popitem(last=False)
        self._counts[prefix.length] -= 1
        if not self._counts[prefix.length]:
            del self._counts[prefix.length]
            self._lengths.remove(prefix.length)
        self._pages.release(prefix.snapshot)
        return True

    def clear(self) -> None:
        while self.evict():
            pass
