"""Out-of-core reductions: one scan for several reducers, merged in a fixed tree, in this process or in workers."""
