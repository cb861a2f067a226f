"""A model folder on its way to an endpoint: packed, checked, and the machine that holds it."""
