"""Tables of the documentation that the program can write: held to it, or written anew with TESSERA_UPDATE_DOCS=1."""

from __future__ import annotations

import os
import re
from pathlib import Path


def hold_table(page: Path, name: str, table: str, test: str) -> None:
    """`table` stands between the marks `<!-- NAME: ... -->` and `<!-- end of NAME -->` of the page, says `test`."""
    marks = re.compile(rf"(<!-- {name}: .*? -->\n)(.*?)(<!-- end of {name} -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    updated = marks.sub(lambda match: match[1] + table + match[3], text)
    if os.environ.get("TESSERA_UPDATE_DOCS"):
        page.write_text(updated, encoding="utf-8")
        return
    assert text == updated, f"run TESSERA_UPDATE_DOCS=1 pytest {test}"
