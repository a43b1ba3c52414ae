"""PEFT's contract: the tuner and its layers, where each module stands, what is saved, and how the method registers."""
