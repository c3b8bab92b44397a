"""From files and datasets to rows of token ids, committed before anything is computed."""
