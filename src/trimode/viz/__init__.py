"""What a person looks at, made from plain data; nothing in here knows a model."""
