"""Uploaded files and chats about them."""
