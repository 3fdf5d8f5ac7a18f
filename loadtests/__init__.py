"""A load client for any server that speaks OpenAI's completions protocol. Knows HTTP, and nothing of what answers."""
