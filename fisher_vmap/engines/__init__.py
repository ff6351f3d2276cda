"""Where work items run: in this process, or on the workers of a Ray cluster.

An engine takes items and what makes results of them, and gives the results as they come. What an item or a result is
it does not know.
"""
