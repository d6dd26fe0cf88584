"""Recipes: the passes of every component as text, recipes from options, and build files with several variants."""
