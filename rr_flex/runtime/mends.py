"""Mends of torch's compiler, for faults that our graphs meet and that are not ours to go around: users' masks meet them
too. Each says what it is for; a torch that no longer has the part is left as it is."""

from functools import cache, wraps
from threading import Lock, RLock

import torch

from rr_flex.runtime.private import autotuner, cpu_flex_template, triton_symbols, wrapped_index

_lock = Lock()
_tuning = RLock()


@torch.compiler.assume_constant_result  # in a caller's graph it runs while that is traced, which is before it compiles
def mend_torch() -> None:
    """All mends, once a process, at the first compilation: what they import, compiling takes anyway."""
    if not _mend_once.cache_info().currsize:  # later calls take no lock, which a fork might leave taken
        with _lock:
            _mend_once()


@cache
def _mend_once() -> None:
    _mend_names_of_sizes()
    _mend_value_of_index()
    _mend_rows_of_split_scans()
    _mend_tuning_in_threads()


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
    if original is None:
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


def _mend_rows_of_split_scans() -> None:
    """Have the row's index in a running sum that several programs share be a scalar, as it is there.

    Inductor splits a sum so where rows are few and long: the lists of a few block rows over 16,384 blocks of keys. A
    program then has one row, whose index has no dimension; whoever asked for it got "list indices must be integers or
    slices, not NoneType" (torch 2.11; pytorch issue 180221).
    """
    found = None if torch.__version__ >= "2.13" else triton_symbols()  # from then on torch has it so
    if found is None:
        return
    original = found.symbols.get_block_shape

    def get_block_shape(cls, expr):
        flat = {tree.prefix for tree in found.graph.kernel.active_range_trees() if tree.tensor_dim is None}
        rows = [kind for kind, prefix in found.types.items() if prefix in flat]
        places = {x: found.scalar for x in expr.free_symbols if any(found.is_type(x, kind) for kind in rows)}
        return original(expr.xreplace(places))

    found.symbols.get_block_shape = classmethod(get_block_shape)


def _mend_tuning_in_threads() -> None:
    """Have a kernel's forms timed by one thread, and the others take what it chose.

    Threads that launch a kernel for the first time at once each time its forms. The first to end unloads all but the
    best (torch 2.14), also those that another is just running: "load_kernel() must be called before run()".
    """
    tuner = autotuner()
    original = getattr(tuner, "autotune_to_one_config", None)
    if original is None:
        return

    @wraps(original)
    def autotune_to_one_config(self, *args, **kwargs):
        with _tuning:
            if len(getattr(self, "launchers", ())) != 1:
                return original(self, *args, **kwargs)

    tuner.autotune_to_one_config = autotune_to_one_config
