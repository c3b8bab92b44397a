"""All analyses together: the table of them, running them by name, and comparing their results."""
