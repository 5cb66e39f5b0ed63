"""Battles of the Arena as its tests turn them."""

from dataclasses import replace

from isotune.projects.arena.battles import SWAPPED_CLASSES, Battle


def swapped(battle: Battle) -> Battle:
    """The same battle with its answers exchanged, and its label with them."""
    label = None if battle.label is None else SWAPPED_CLASSES[battle.label]
    return replace(battle, answer_a=battle.answer_b, answer_b=battle.answer_a, label=label)
