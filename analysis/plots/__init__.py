"""Figures and the report, drawn from results alone."""
