"""Reading a model: which channels live and die together."""
