"""The handler behind DJL's own Java engine and Python worker, as they are released."""
