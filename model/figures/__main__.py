"""Draws what a trained network does, four pictures for one model directory.

    python -m model.figures MODEL_DIR OUT_DIR --text FILE[.xz] [--sentence TEXT]

retrieval.png: what contextual memories retrieved for a sentence. keys.png: half-lives and sharpness. persistent.png:
what persistent memories hold. position.png: the loss along a text, and without each memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from model.checkpoint import load_model
from model.evaluate import read_text
from model.figures.keys import draw_keys
from model.figures.persistent import draw_persistent
from model.figures.position import draw_position
from model.figures.retrieval import SENTENCE, draw_retrieval
from model.tokenizer import Tokenizer

# The loss is drawn as far as twice the trained window.
_BEYOND, _MOST_WINDOWS, _LOOKED_AT = 2, 24, 8


def draw_all(model_dir: Path, text: Path, sentence: str, out_dir: Path) -> list[Path]:
    """The files drawn. Raises ValueError or OSError naming what is wrong with an argument."""
    model, tokenizer = load_model(model_dir), Tokenizer.load(model_dir)
    if tokenizer is None:
        raise ValueError(f"{model_dir}: has no tokenizer.json, so it cannot read text")
    windows = _windows(read_text(text, tokenizer), _BEYOND * model.config.block_size, text)
    short = windows[:_LOOKED_AT, : model.config.block_size]
    return [
        draw_retrieval(model, tokenizer, sentence, out_dir / "retrieval.png"),
        draw_keys(model, short, out_dir / "keys.png"),
        draw_persistent(model, tokenizer, short, out_dir / "persistent.png"),
        draw_position(model, windows, out_dir / "position.png"),
    ]


def _windows(token_ids: list[int], window: int, text: Path) -> Tensor:
    """[windows, window + 1], spread over the text."""
    count = (len(token_ids) - 1) // window
    if count < 1:
        raise ValueError(f"{text}: {len(token_ids)} tokens, at least {window + 1} are needed")
    starts = (torch.arange(min(count, _MOST_WINDOWS)) * count // min(count, _MOST_WINDOWS)) * window
    return torch.tensor(token_ids)[starts[:, None] + torch.arange(window + 1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m model.figures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="documents, plain or .xz")
    parser.add_argument("--sentence", default=SENTENCE, help="to show retrieval with (default: %(default)s)")
    options = parser.parse_args(arguments)
    errors = Console(stderr=True)
    try:
        with errors.status("Drawing"):
            drawn = draw_all(options.model_dir, options.text, options.sentence, options.out_dir)
    except ImportError:
        errors.print('error: drawing needs matplotlib, which the extra "figures" installs', highlight=False)
        return 2
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    for path in drawn:
        Console().print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
