"""Texts of the centred backbone: its prompt, and instructions that say little, whose mean is common to all."""

PROMPT = 'This sentence: "{}" means in one word: "'  # PromptEOL, arXiv 2307.16645

REFERENCE = (
    "Answer the question.",
    "Solve the task.",
    "Write a short text.",
    "Read the text and reply.",
    "Do what is asked.",
    "Compute the result.",
    "Choose the best option.",
    "Describe the picture.",
    "Continue the story.",
    "Correct the mistakes.",
    "Rewrite this in other words.",
    "Give an example.",
    "Compare the two.",
    "Explain your answer step by step.",
    "Be brief.",
    "You are a helpful assistant.",
)
