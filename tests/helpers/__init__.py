"""What the tests share: models, references, files and words. No test file imports another (see test_house.py)."""
