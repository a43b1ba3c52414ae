"""One adapter that is told in words which of four tasks to do."""
