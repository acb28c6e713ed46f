"""Recipes that make the embedded models, from data preparation to the model card."""
