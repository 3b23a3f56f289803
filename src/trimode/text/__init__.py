"""Strings to ids and back: tokenizers, chat templates, and text that arrives token by token.

Nothing here knows a model. Importing is cheap: the tokenizers and jinja2 libraries are loaded when first used.
"""

from trimode.text.chat_template import render_chat, validate_messages
from trimode.text.stream import StopMatcher, TextStream
from trimode.text.tokenizer import Tokenizer

__all__ = ["StopMatcher", "TextStream", "Tokenizer", "render_chat", "validate_messages"]
