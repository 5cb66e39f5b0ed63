"""Preference between two answers to a question, as a judge has it: what is asked, who is asked, and the win rates."""
