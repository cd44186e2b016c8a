"""Mends of torch's compiler, for faults that our graphs meet and that are not ours to go around: users' masks meet them
too. Each says what it is for; a torch that no longer has the part is left as it is."""

from functools import cache, wraps
from threading import Lock

import torch

from rr_flex.runtime.private import cpu_flex_template, wrapped_index

_lock = Lock()


@torch.compiler.assume_constant_result  # in a caller's graph it runs while that is traced, which is before it compiles
def mend_torch() -> None:
    """All mends, once a process, at the first compilation: what they import, compiling takes anyway."""
    _mend_once()


@cache
def _mend_once() -> None:
    with _lock:
        _mend_names_of_sizes()
        _mend_value_of_index()


def _mend_names_of_sizes() -> None:
    """Have the rows and columns of a tile in the CPU's kernel of FlexAttention named after their own symbols ("ku0",
    "ku1"), which no length is.

    Its code is written with names for them ("ks2", "ks3"), which are then replaced as text by what they stand for
    (torch 2.11 to 2.13, CppFlexAttentionTemplate.modification). A length that a mask's tensors bring along may be
    called "ks3" or "ks27": then its name is replaced too, and the kernel does not compile, or reads the wrong size.
    Which masks and lengths meet it depends on the hashes that the lengths' symbols are named after.
    """
    template = cpu_flex_template()
    original = getattr(template, "modification", None)
    if original is None or getattr(original, "names_are_mended", False):
        return

    @wraps(original)
    def modification(self, *args, **kwargs):
        names = getattr(self, "extra_sizevars", None)
        if names is None or not hasattr(self, "block_vars"):
            return original(self, *args, **kwargs)
        # What stands here is named after itself; without this the two are named by how many names there are.
        self.extra_sizevars = [*names, *(symbol for symbol in self.block_vars if symbol not in names)]
        try:
            return original(self, *args, **kwargs)
        finally:
            self.extra_sizevars = names

    modification.names_are_mended = True
    template.modification = modification


def _mend_value_of_index() -> None:
    """Have a number that inductor wraps (Identity) be the number.

    The index into a part of a concatenation is wrapped. Where it stands at one, the wrapper has no value, or one that
    sympy does not take to be exact: then the smaller of an index and a length "is not comparable" and nothing compiles
    (torch 2.11 to 2.15). From torch 2.14 on padding is such a concatenation on a GPU, and our counts of the real keys
    in a stride, and the blocks that a mask shows, are padded.
    """
    from sympy.core.cache import clear_cache

    wrapper = wrapped_index()
    if wrapper is not None and "eval" not in vars(wrapper):
        wrapper.eval = classmethod(lambda cls, inner: inner if inner.is_Number else None)
        clear_cache()  # of wrappers made before
