"""The report of an adapter's routes on a user's data, as one HTML file (`docs/routes.md`).

`__main__` (the command) > `page` (what the file says) > `measuring` (what it is made of).
"""
