"""A server in miniature: a scheduler that cuts, mixes, preempts and cancels at random, over a cache of pages.

Its keys and values are looked up by the tokens up to their position, so that two requests share what their common
prefix makes and nothing else.
"""

import random
from dataclasses import dataclass, field

import torch

VOCABULARY = 1021  # distinct keys; a prime, so that the rolling hash spreads


@dataclass
class Request:
    tokens: list[int]
    prompt: int  # tokens of it
    wanted: int  # tokens in the end
    computed: int = 0
    preempted: int = 0  # times
    prefill: int = 0  # tokens that the server takes for the prompt
    table: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)  # of each token: a hash of all up to it

    def __post_init__(self):
        for token in self.tokens:
            self.name(token)

    def name(self, token):
        before = self.names[-1] if self.names else 7
        self.names.append((before * 1_000_003 + token * 97 + 1) % 2_147_483_647)

    @property
    def rows(self):
        """Places of the request's keys in the vocabulary."""
        return torch.tensor(self.names) % VOCABULARY


@dataclass
class Chunk:
    """What a step computes of one request."""

    request: Request
    start: int
    stop: int
    prefilling: bool


class PagedServer:
    """Pages, their owners and a cache of prefixes; `step()` gives the chunks of a step with their pages allotted."""

    def __init__(self, seed: int, *, pages: int, page: int, longest: int, resumes_prompts: bool = False):
        self.resumes_prompts = resumes_prompts  # whether a resumed request is a prompt of all that it has
        self.random = random.Random(seed)
        self.page, self.longest = page, longest
        self.free = list(range(pages))
        self.random.shuffle(self.free)
        self.users = [0] * pages
        self.cached: dict[int, int] = {}  # name of a page's last token -> page
        self.name_of: dict[int, int] = {}
        self.shared = [[self.random.randrange(50) for _ in range(longest)] for _ in range(2)]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.seen = {"hits": 0, "preempted": 0, "cancelled": 0, "evicted": 0}

    def arrive(self):
        length = self.random.randint(1, self.longest)
        common = self.random.randint(0, length) if self.random.random() < 0.6 else 0
        tokens = self.random.choice(self.shared)[:common]
        tokens = tokens + [self.random.randrange(50) for _ in range(length - common)]
        self.waiting.append(Request(tokens, length, length + self.random.randint(0, self.page // 2 + 2)))

    def step(self) -> list[Chunk]:
        if self.random.random() < 0.6:
            self.arrive()
        self._leave()
        while self.waiting and len(self.running) < 4 and self.random.random() < 0.7:
            self._admit(self.waiting.pop(0))
        self.random.shuffle(self.running)
        chunks = []
        budget = self.random.randint(1, self.longest)
        for request in list(self.running):
            if request not in self.running:  # preempted for one before it
                continue
            left = len(request.tokens) - request.computed
            count = min(left, self.random.randint(1, max(1, budget)))
            if count and self._allot(request, request.computed + count, {id(chunk.request) for chunk in chunks}):
                stop = request.computed + count
                chunks.append(Chunk(request, request.computed, stop, request.computed < request.prefill))
        return chunks

    def finish(self, chunks):
        """After the step: positions are computed, whole pages may be shared, and a token follows a whole request."""
        for chunk in chunks:
            request = chunk.request
            request.computed = chunk.stop
            for place in range(chunk.start // self.page, chunk.stop // self.page):
                self._share(request.names[(place + 1) * self.page - 1], request.table[place])
            if request.computed == len(request.tokens):
                if len(request.tokens) < request.wanted:
                    token = self.random.randrange(50)
                    request.tokens.append(token)
                    request.name(token)
                else:
                    self._release(request)

    def slots(self, chunk):
        positions = range(chunk.start, chunk.stop)
        return [chunk.request.table[at // self.page] * self.page + at % self.page for at in positions]

    def _leave(self):
        for request in list(self.running):
            draw = self.random.random()
            if draw < 0.05:
                self.seen["cancelled"] += 1
                self._release(request)
            elif draw < 0.12:
                self._preempt(request)

    def _preempt(self, request):
        self.seen["preempted"] += 1
        self._release(request)
        request.computed = 0
        request.preempted += 1
        self.waiting.insert(0, request)

    def _admit(self, request):
        # At least one token is computed, as in vLLM.
        for place in range((len(request.tokens) - 1) // self.page):
            page = self.cached.get(request.names[(place + 1) * self.page - 1])
            if page is None:
                break
            self.seen["hits"] += 1
            self._take(page)
            request.table.append(page)
        request.computed = len(request.table) * self.page
        request.prefill = len(request.tokens) if self.resumes_prompts else request.prompt
        self.running.append(request)

    def _take(self, page):
        if page in self.free:
            self.free.remove(page)
        self.users[page] += 1

    def _allot(self, request, length, busy):
        while len(request.table) * self.page < length:
            if not self.free:
                others = [other for other in self.running if other is not request and id(other) not in busy]
                if not others:
                    return False
                self._preempt(others[-1])
                continue
            page = self.free.pop(0)
            if page in self.name_of:
                self.seen["evicted"] += 1
                del self.cached[self.name_of.pop(page)]
            self.users[page] += 1
            request.table.append(page)
        return True

    def _share(self, name, page):
        if name not in self.cached and page not in self.name_of:
            self.cached[name], self.name_of[page] = page, name

    def _release(self, request):
        self.running.remove(request)
        for page in request.table:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.insert(self.random.randint(0, len(self.free)), page)
        request.table = []
