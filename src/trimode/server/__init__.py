"""HTTP, nothing else: OpenAI's API over the engine, a page to look at it, and what an operator needs."""
