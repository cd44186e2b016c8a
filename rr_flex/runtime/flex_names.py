"""A mend of torch's CPU kernel of FlexAttention: the names that it gives to sizes must not run into each other.

Its code is written with names for the rows and columns of a tile ("ks2", "ks3"), which are then replaced as text by
what they stand for (torch 2.11 to 2.13, CppFlexAttentionTemplate.modification). A length that a mask's tensors bring
along may be called "ks3" or "ks27": then its name is replaced too, and the kernel does not compile, or reads the wrong
size. Which masks and lengths meet it depends on the hashes that the lengths' symbols are named after.
"""

from functools import cache, wraps
from threading import Lock

from rr_flex.runtime.private import cpu_flex_template

_lock = Lock()


@cache
def mend_flex_names() -> None:
    """Have the rows and columns of a tile named after their own symbols ("ku0", "ku1"), which no length is.

    Once a process, at the first compilation: the template is imported here, which takes what compiling takes anyway.
    A torch whose template has no such part is left as it is.
    """
    template = cpu_flex_template()
    with _lock:
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
