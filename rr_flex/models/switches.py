"""What of ours is on in a model: any number of things, in any threads, left in any order; the last entered holds."""

from collections.abc import Callable, Iterator
from threading import RLock
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rr_flex.models.layer_plan import ATTRIBUTE, set_plan

SWITCHES = "rr_flex_switches"  # attribute of the model and of its attention modules
_LOCK = RLock()


class Switches(list):
    """The things that are on, the last on top. Below them, how to give the model back what it had.

    A copy of the model has none: it keeps the attention that it was copied with.
    """

    as_it_was: Callable[[], None]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Switches":
        return Switches()

    def __reduce__(self) -> tuple:
        return Switches, ()


def switch_on(root: PreTrainedModel, thing: Any) -> None:
    """`thing.apply()` gives the model its attention; from now on, until `switch_off` takes it away."""
    with _LOCK:
        switches = getattr(root, SWITCHES, None)
        if not switches:
            switches = Switches()
            switches.as_it_was = _restorer(root)
            for module in _places(root):
                setattr(module, SWITCHES, switches)
        switches.append(thing)
        thing.apply()


def switch_off(root: PreTrainedModel, thing: Any) -> None:
    """Takes `thing` away wherever it stands; a second call does nothing."""
    with _LOCK:
        switches = getattr(root, SWITCHES, ())
        if not any(other is thing for other in switches):
            return
        switches[:] = [other for other in switches if other is not thing]
        switches.as_it_was()
        if switches:
            switches[-1].apply()
        else:
            for module in _places(root):
                module.__dict__.pop(SWITCHES, None)


def _places(root: PreTrainedModel) -> list[nn.Module]:
    return [module for module in root.modules() if module is root or hasattr(module, "config")]


def _restorer(root: PreTrainedModel) -> Callable[[], None]:
    """Gives the model the attention and the plans that it has now."""
    configs = [(config, config._attn_implementation) for config in _configs_of(root)]
    plans = [(module, getattr(module, ATTRIBUTE, None)) for module in _places(root)]

    def restore() -> None:
        for config, before in configs:
            config._attn_implementation_internal = before
        for module, plan in plans:
            set_plan(module, plan)

    return restore


def _configs_of(root: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Every config in the model, once."""
    waiting = [root.config] + [m.config for m in root.modules() if isinstance(m, PreTrainedModel)]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        waiting += [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]
