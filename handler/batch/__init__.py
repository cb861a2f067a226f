"""``python -m handler batch``: a file of requests, answered line by line on one machine."""
