"""Tasks: strings in, strings out, scores. No task knows a model, a tokenizer or a cache."""
