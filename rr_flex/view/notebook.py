"""`%load_ext rr_flex.notebook`: BlockMasks and matplotlib figures draw themselves, and `explore` adds widgets."""

import io
from collections.abc import Callable, Iterable
from typing import Any

from rr_flex.view.drawing import block_mask_html


def load_ipython_extension(ipython) -> None:
    """Called by IPython's %load_ext. Nothing is imported until such an object is shown."""
    formatters = ipython.display_formatter.formatters
    flex = "torch.nn.attention.flex_attention"
    formatters["text/html"].for_type_by_name(flex, "BlockMask", block_mask_html)
    formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", figure_png)


def figure_png(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def explore(draw: Callable[..., Any], **choices: Iterable[Any]) -> None:
    """Shows draw(name=first choice, …) as the cell's picture, and a widget for each name that redraws it.

    Without a kernel (on GitHub, on a page) the picture stays. Needs ipywidgets.
    """
    from IPython.display import display
    from ipywidgets import HBox, SelectionSlider

    sliders = {}
    for name, values in choices.items():
        options = list(values)
        if not options:
            raise ValueError(f"{name} must have at least one choice, got none")
        sliders[name] = SelectionSlider(options=options, description=name, continuous_update=False)

    def drawn() -> Any:
        return draw(**{name: slider.value for name, slider in sliders.items()})

    display(HBox(list(sliders.values())))
    picture = display(drawn(), display_id=True)
    for slider in sliders.values():
        slider.observe(lambda _: picture.update(drawn()), names="value")
