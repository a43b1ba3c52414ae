"""The check of a user's own model: one answer, however it is run (`docs/check.md`).

`checking` (what users call) > `runs` (each way of running) > `copies`, `sequences` and `report`.
"""
