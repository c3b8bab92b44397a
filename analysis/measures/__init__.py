"""The measures of a run, a file each or a few: what they count, how they are reduced, what they return."""
