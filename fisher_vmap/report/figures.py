"""The page's figures, as plotly takes them. Colours are names of the page's palette ("@blue"), light or dark.

Figures are plain dictionaries: the page turns "@name" into the theme's colour, and "@name/0.2" into that colour with an
opacity, whenever the theme changes.
"""

from fisher_vmap.report.distributions import histograms, mean_spectrum, spectra
from fisher_vmap.report.parts import Figure
from fisher_vmap.report.prompt_maps import scatter, similarity
from fisher_vmap.report.survey import Survey


def layer_figures(survey: Survey, number: int) -> dict[str, Figure]:
    """The figures of one layer by name; those of single prompts are left out where there are none."""
    layer = survey.layers[number]
    figures = {"mean": mean_spectrum(layer), **histograms(survey, layer)}
    if layer.S is not None and len(layer.S):
        figures["spectra"] = spectra(survey, layer)
    if layer.similarity is not None:
        figures["similarity"] = similarity(survey, layer)
        for name in survey.rows.groups:
            figures[f"similarity by {name}"] = similarity(survey, layer, name)
    figures["scatter by covered mass"] = scatter(survey, layer)
    for name in survey.rows.groups:
        figures[f"scatter by {name}"] = scatter(survey, layer, name)
    return figures
