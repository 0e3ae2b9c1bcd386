"""Rewards for tests, named by gin files."""


def digits(prompt, answer):
    """The share of digits in an answer of eight characters."""
    return sum(character.isdigit() for character in answer) / 8


def not_a_number(prompt, answer):
    return float("nan")
