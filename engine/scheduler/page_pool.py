"""Allocator of the paged KV cache: reference counts of pages, and a prefix cache of those whose content is known.

A page is room for the keys and values of `page_size` tokens in every layer. It is in one of three states:

    used     has owners: sequences whose page tables name it (more than one where they share a prefix)
    cached   has no owner, but its content is known and found again until the page is evicted
    free     has no owner and no known content

A page that is full has a key: a digest of its tokens and of the key of the page before it, so that equal keys mean
equal tokens from the sequence's first one on. This is bookkeeping only; the keys and values are elsewhere.
"""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b


class OutOfPages(RuntimeError):
    """More pages were asked for than have no owner."""


@dataclass
class HitStatistics:
    """Hits of the prefix cache, in tokens: prompts' tokens looked up, and those found."""

    asked: int = 0
    found: int = 0

    def record(self, asked: int, found: int) -> None:
        self.asked += asked
        self.found += found

    @property
    def rate(self) -> float:
        """Found of asked, 0 to 1; 0 when nothing was asked."""
        return self.found / self.asked if self.asked else 0.0


def extend_keys(keys: list[bytes], tokens: Sequence[int], page_size: int, salt: bytes = b"") -> None:
    """Append the keys of the pages that `tokens` fill to `keys`, which holds those of the first ones.

    Args:
        keys: What an earlier call for the same sequence left, or an empty list.
        tokens: A sequence's token ids from its first one on, each below 2^32.
        page_size: Tokens a page.
        salt: Sequences of different salts share nothing.
    """
    first, full = len(keys), len(tokens) // page_size
    if first >= full:
        return
    content = array("I", tokens[first * page_size : full * page_size]).tobytes()  # "i" takes three times as long
    key = keys[-1] if keys else blake2b(salt).digest()
    size = len(content) // (full - first)
    for begin in range(0, len(content), size):
        key = blake2b(key + content[begin : begin + size]).digest()
        keys.append(key)


class PagePool:
    """`pages` pages of `page_size` tokens each, numbered from 0. `free` + `cached` + `used` == `pages` at all times.

    Args:
        pages: Pages in all.
        page_size: Tokens a page.
        prefix_cache: Whether contents are found again; without it no page is ever cached.

    Raises:
        ValueError: `pages` or `page_size` is below 1.
    """

    def __init__(self, pages: int, page_size: int, prefix_cache: bool = True) -> None:
        for name, value in (("pages", pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} = {value}; it must be at least 1")
        self.pages, self.page_size, self.prefix_cache = pages, page_size, prefix_cache
        self.hits = HitStatistics()
        self._owners = [0] * pages
        self._keys: list[bytes | None] = [None] * pages
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(pages))[::-1]  # the next one last
        self._cached: dict[int, Hashable] = {}  # page → session that released it last
        # LRU of sessions, each one's cached pages in eviction order.
        self._sessions: OrderedDict[Hashable, dict[int, None]] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.pages - self.available

    @property
    def available(self) -> int:
        """Pages that `take` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_size)

    def owners(self, page: int) -> int:
        return self._owners[page]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest cached prefix of `keys`; to hold on to them, `share` them."""
        found = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to each of `pages`, which have owners or are cached.

        Raises:
            ValueError: A page is free; those before it in `pages` have been shared.
        """
        owners, cached = self._owners, self._cached
        for page in pages:
            if not owners[page]:
                if page not in cached:
                    raise ValueError(f"page {page} is free: it holds nothing to share")
                self._uncache(page)
            owners[page] += 1

    def take(self, count: int) -> list[int]:
        """Allocate `count` pages for one owner: free ones, then cached ones, evicted from the session that was used
        longest ago, the ends of its sequences first.

        Raises:
            OutOfPages: Fewer than `count` have no owner; nothing has changed.
        """
        if count > self.available:
            raise OutOfPages(
                f"{count} pages were asked for; of {self.pages}, {self.free} are free and {self.cached} cached"
            )
        taken = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._owners[page] = 1
            taken.append(page)
        return taken

    def _evict(self) -> int:
        page = next(iter(next(iter(self._sessions.values()))))
        self._uncache(page)
        key = self._keys[page]
        assert key is not None
        del self._by_key[key]
        self._keys[page] = None
        return page

    def _uncache(self, page: int) -> None:
        """Take a page out of the cached ones: it is evicted, or has an owner again."""
        session = self._cached.pop(page)
        pages = self._sessions[session]
        del pages[page]
        if not pages:
            del self._sessions[session]

    def release(self, pages: Sequence[int], session: Hashable | None = None) -> None:
        """Remove an owner from each of `pages`, the first pages of a sequence in order; those without one are then
        cached or free. Its last page is evicted first, so that prefixes outlive their ends.

        session: Under which cached pages are kept, as long as it is used. None: the sequence is a session of its own.

        Raises:
            ValueError: A page has no owner; those after it in `pages` have been released.
        """
        session = object() if session is None else session
        if session in self._sessions:
            self._sessions.move_to_end(session)
        for page in reversed(pages):
            if not self._owners[page]:
                raise ValueError(f"page {page} has no owner to release it")
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = session
                self._sessions.setdefault(session, {})[page] = None

    def forget(self) -> None:
        """Evict every cached page: nothing without an owner is found again."""
        while self._cached:
            self._free.append(self._evict())

    def register(self, page: int, key: bytes) -> bool:
        """Enter `page`, which is full and will not be written again, into the prefix cache under `key`.

        Returns:
            False where nothing was done: another page already has that content, or there is no prefix cache.

        Raises:
            ValueError: The page has no owner, or is known by another key.
        """
        if not self._owners[page]:
            raise ValueError(f"page {page} has no owner to register it")
        if self._keys[page] not in (None, key):
            raise ValueError(f"page {page} is registered under another key")
        if not self.prefix_cache or self._by_key.setdefault(key, page) != page:
            return False
        self._keys[page] = key
        return True
