"""Entry points: YAML in, one function called."""
