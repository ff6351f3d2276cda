"""The report on a results folder: one HTML page that needs no network, and images of its figures.

Imports inside this folder point one way, each line on those before it:

    outliers, similarity, rows              what is found in the numbers; nothing of it draws
    survey                                  all of it for the layers of a folder, with what was sampled
    parts, figures, images                  plotly's figures and what they are made of; matplotlib's images
    page
    command
"""
