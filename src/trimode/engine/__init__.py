"""The only caller of the model at inference: prompts in, answers out, many at once."""
