"""Chats with documents attached: which documents a chat has, and answers from them."""
