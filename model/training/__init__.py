"""From text to a model directory: recipe, corpus, packed tokens, optimisation, state that can be resumed."""
