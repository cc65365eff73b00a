"""Picture files: decoded by the rules that all data share, and those that prompts name to be drawn from."""
