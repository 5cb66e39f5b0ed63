"""Chatbot Arena: which of two answers people prefer."""
