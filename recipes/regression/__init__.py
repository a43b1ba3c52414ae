"""The regression runs of the paper's Sec. 4.1 and B.3."""
