"""Looks at a run and never touches its maths."""
