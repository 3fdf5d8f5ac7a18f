"""The HTTP side: text in, text out. Imports neither torch nor ray."""
