"""The report on a results folder: one HTML page that needs no network, and images of its figures.

__main__  the command
data      the numbers of the figures and the table, and which prompts of a large run are shown
targets   several targets a prompt: their numbers, completions, and the pairs that are traded
outliers  prompts whose matrix is unlike the rest, with the reason
figures   the page's figures, for plotly
images    the main figures as PNGs, by matplotlib
page      the page
lens      the page's part on a Jacobian lens, and a page of it alone
"""
