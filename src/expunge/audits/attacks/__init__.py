"""Attacks: checks that try to bring the forgotten back, or to tell that it was there."""
