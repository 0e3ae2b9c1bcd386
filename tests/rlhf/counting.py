"""A reward for tests, named by gin files."""


def digits(prompts, answers):
    """The share of digits in an answer of eight characters."""
    return [sum(character.isdigit() for character in answer.text) / 8 for answer in answers]
