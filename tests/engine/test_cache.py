"""PageAllocator under any order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyruntime.engine.cache import PageAllocator


class PageMachine(RuleBasedStateMachine):
    """Several owners grow and release; the books are kept a second time, as sets."""

    @initialize(num_pages=st.integers(0, 12), page_size=st.integers(1, 5))
    def start(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.allocator = PageAllocator(num_pages, page_size)
        self.owners: list[list[int]] = [[] for _ in range(4)]

    @rule(owner=st.integers(0, 3), num_tokens=st.integers(0, 40))
    def grow(self, owner: int, num_tokens: int) -> None:
        pages = self.owners[owner]
        before, free = list(pages), self.num_pages - sum(map(len, self.owners))
        needed = len(range(0, num_tokens, self.page_size))
        grown = self.allocator.grow(pages, num_tokens)
        assert grown == (needed - len(before) <= free)
        # what was handed out stays where it is, and a refusal changes nothing
        assert pages[: len(before)] == before
        assert len(pages) == (max(needed, len(before)) if grown else len(before))

    @rule(owner=st.integers(0, 3))
    def release(self, owner: int) -> None:
        self.allocator.release(self.owners[owner])
        self.owners[owner] = []

    @rule(owner=st.integers(0, 3))
    def release_twice_is_caught(self, owner: int) -> None:
        pages, self.owners[owner] = self.owners[owner], []
        self.allocator.release(pages)
        if pages:
            with pytest.raises(AssertionError, match="not owned"):
                self.allocator.release(pages)

    @invariant()
    def every_page_is_free_or_owned_once(self) -> None:
        if not hasattr(self, "owners"):
            return
        owned = [page for pages in self.owners for page in pages]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(self.num_pages))
        assert self.allocator.num_free + len(owned) == self.num_pages


TestPageAllocator = PageMachine.TestCase
TestPageAllocator.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_pages_are_counted_up(num_tokens: int, pages: int) -> None:
    assert PageAllocator(99, 16).pages_for(num_tokens) == pages
