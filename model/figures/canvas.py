"""A picture to draw on and its file. Needs matplotlib, which the extra `figures` installs."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = 128
MEMORY_COLOURS = {"contextual": "C0", "persistent": "C1", "short-term": "C0", "long-term": "C2"}


def new_figure(width: float, height: float) -> Figure:
    """A picture of so many inches. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG whose bytes depend on nothing but what was drawn; returns `path`."""
    from PIL import Image  # matplotlib needs it too

    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A palette makes a third of the bytes, and shows no difference.
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(path, optimize=True)
    return path


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and axes in small print, a faint grid, a legend where lines have names."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.6)


def head_ticks(axes: Axes, num_layers: int, num_heads: int) -> None:
    """Along x: heads one after another, layers named and parted by lines."""
    for layer in range(1, num_layers):
        axes.axvline(layer * num_heads - 0.5, color="0.8", linewidth=0.8)
    axes.set_xticks(
        [(layer + 0.5) * num_heads - 0.5 for layer in range(num_layers)], [str(layer) for layer in range(num_layers)]
    )
    axes.set_xlim(-0.5, num_layers * num_heads - 0.5)


def words(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """What tokens say, on one line, without the space before it and free of matplotlib's mathematics."""
    text = tokenizer.decode(token_ids, skip_special=False)
    return text.replace("\n", "↵").replace("�", "·").replace("$", r"\$").removeprefix(" ")
