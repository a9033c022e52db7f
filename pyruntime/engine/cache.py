"""Pages of the KV cache: who owns which. The bytes themselves are the plan's."""

from __future__ import annotations

from collections.abc import Sequence


class PageAllocator:
    """Hands out page numbers 0 to `num_pages` - 1; every page is free or owned once."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def grow(self, pages: list[int], num_tokens: int) -> bool:
        """Append pages to `pages` until `num_tokens` tokens fit; change nothing and say False if too few are free."""
        missing = self.pages_for(num_tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._free.pop()
            self._owned.add(page)
            pages.append(page)
        return True

    def release(self, pages: Sequence[int]) -> None:
        """Give `pages` back."""
        for page in pages:
            # a page given back twice would be owned twice later: stop here, not there
            assert page in self._owned, f"page {page} is not owned"
            self._owned.remove(page)
            self._free.append(page)
