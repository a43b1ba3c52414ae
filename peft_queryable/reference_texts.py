"""Instructions that say little: the mean of their states is what the states of all instructions have in common."""

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
