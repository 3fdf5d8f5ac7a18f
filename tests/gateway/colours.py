"""Colours of a page in a browser, and how well they can be told apart."""

from __future__ import annotations

import re

from tests.gateway.browser import Browser


def colour(browser: Browser, selector: str, kind: str) -> tuple[float, float, float]:
    """A computed colour, such as "backgroundColor", of the first element that matches; parts from 0 to 1."""
    found = f"document.querySelector({selector!r})"
    red, green, blue = re.findall(r"\d+", browser.js(f"getComputedStyle({found}).{kind}"))[:3]
    return int(red) / 255, int(green) / 255, int(blue) / 255


def luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Contrast ratio as WCAG 2 defines it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
