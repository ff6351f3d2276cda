"""Checks of a results folder.

__main__   the command, and its checks of the files and their numbers
kl         predictions compared with the model, and `measured_kl`
kl_report  the comparison as text and as a plot
"""
