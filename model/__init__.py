"""Memory Mosaics: the network, its memory cache and its files. Knows nothing of requests, HTTP or Ray."""
