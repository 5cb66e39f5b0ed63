"""Chats and texts to go on with, in the form of OpenAI's API."""
