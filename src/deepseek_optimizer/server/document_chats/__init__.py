"""Chats with attached documents: reading the attachments, and answering from them."""
