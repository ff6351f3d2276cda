"""Two results folders of the same prompts beside each other: a table, one HTML page, and the numbers as JSON.

__main__  the command
tables    the printed table, the JSON, and the rows that the page shows too
page      the page, with a histogram

The numbers are those of `fisher_vmap.results.comparison`.
"""
