"""Other servers to measure beside: how they are installed, what they serve, and the table of ratios."""
